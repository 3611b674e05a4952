"""What would silently ruin a draft's acceptance is refused at load, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ModelLoadError
from engine.models.dflash.formats import load
from engine.models.dflash.spec import DFlashSpec
from tests.numeric.dflash_checkpoints import (
    DFLASH2,
    DSPARK,
    PLAIN,
    SMALL_VOCABULARY,
    TARGET,
    Checkpoint,
    speculators,
    zlab,
)
from tests.tiny import byte_tokenizer
from tests.tiny_drafts import tiny_tensors

FULL = "full_attention"


def section(made: Checkpoint, name: str) -> dict[str, object]:
    found = made.config[name]
    assert isinstance(found, dict)
    return found


def top(**changes: object) -> Callable[[Checkpoint], None]:
    return lambda made: made.config.update(changes)


def own(**changes: object) -> Callable[[Checkpoint], None]:
    return lambda made: section(made, "dflash_config").update(changes)


def swap(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Checkpoint], None]:
    return lambda made: made.tensors.update({name: change(made.tensors[name])})


def drop(name: str) -> Callable[[Checkpoint], None]:
    return lambda made: made.tensors.__delitem__(name)


def add(name: str, tensor: torch.Tensor) -> Callable[[Checkpoint], None]:
    return lambda made: made.tensors.update({name: tensor})


def _broken(tensor: torch.Tensor) -> torch.Tensor:
    broken = tensor.clone()
    broken.view(-1)[3] = float("nan")
    return broken


Q = "layers.1.self_attn.q_proj.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e3}
MISMATCHES: list[tuple[DFlashSpec, Callable[[Checkpoint], None], str]] = [
    (PLAIN, top(hidden_size=128), "hidden_size is 128, the target's is 64; this draft belongs to another model"),
    (PLAIN, top(vocab_size=300), "vocab_size is 300, the target's is 259"),
    (PLAIN, top(num_target_layers=6), "num_target_layers is 6, the target has 4 layers; it belongs to another model"),
    (PLAIN, top(num_target_layers=5), "num_target_layers is 5, .* count the embedding as a layer"),
    (PLAIN, own(target_layer_ids=[1, 2, 4]), r"target_layer_ids \[1, 2, 4\] must lie between 0 and 3 .* off by one"),
    (PLAIN, own(target_layer_ids=[0, -2, 1]), r"target_layer_ids \[0, -2, 1\] must lie between 0 and 3 \(or be -1"),
    (PLAIN, own(target_layer_ids=[1, 1, 2]), "names a layer twice"),
    (PLAIN, own(target_layer_ids=[0, 2]), "fc.weight is 192 wide, but 2 taps of hidden size 64 need 128"),
    (PLAIN, own(target_layer_ids=None), "target_layer_ids is missing; it must be a list of integers"),
    (PLAIN, own(mask_token_id=259), "mask_token_id is 259, but the target's embedding table has 259 rows"),
    (PLAIN, own(mask_token_id=None), "mask_token_id is missing, and the target's tokenizer.json does not name it"),
    (PLAIN, top(mask_token_id=3), "mask_token_id is 3 at the top, but 258 in dflash_config"),
    (PLAIN, top(block_size=1), "block_size is 1; it must be 2 to 256"),
    (PLAIN, top(block_size="16"), 'block_size is "16"; it must be an integer'),
    (PLAIN, top(rope_theta=None), "rope_theta is missing; it must be the one that the draft was trained with"),
    (PLAIN, top(rope_parameters=YARN | {"rope_theta": 1e6}), r"rope_theta is given twice, as \[5000.0, 1000000.0\]"),
    (PLAIN, top(rope_parameters=YARN | {"rope_type": "longrope"}), "rope_type is .*longrope.*one of default, linear"),
    (PLAIN, top(rope_parameters=YARN | {"gamma": 1}), "rope_parameters: gamma: unknown here"),
    (PLAIN, top(rope_scaling={"type": "linear"}), "rope_scaling: factor is missing"),
    (PLAIN, top(rope_theta=0), "rope_theta is 0.0; it must be above 0"),
    (PLAIN, top(rope_scaling={"type": "linear", "factor": -1}), "factor is -1; it must be above 0"),
    (PLAIN, top(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; .*rotate whole heads"),
    (PLAIN, top(is_neox_style=False), "is_neox_style is false; it must be true.*halves, not pairs"),
    (PLAIN, top(num_attention_heads=3), "num_attention_heads 3 is no multiple of num_key_value_heads 2"),
    (PLAIN, top(num_attention_heads=8), r"q_proj.weight has .*\[64, 64\].*\[128, 64\] \(8 heads, 2 of keys, 16 wide"),
    (PLAIN, top(head_dim=None), r"q_proj.weight has the shape \[64, 64\]; config.json asks for \[512, 64\]"),
    (PLAIN, top(intermediate_size=0), "intermediate_size is 0"),
    (PLAIN, top(hidden_act="mish"), "hidden_act is 'mish'; known are"),
    (PLAIN, top(layer_types=[FULL]), "layer_types is .* it must be 2 times"),
    (PLAIN, top(layer_types=[FULL, "chunked_attention"]), "layer_types is .* it must be 2 times"),
    (PLAIN, top(sliding_window=None), "sliding_window is missing; it must be the window of the sliding layers"),
    (PLAIN, top(use_sliding_window=False), "sliding_attention, but use_sliding_window is false"),
    (PLAIN, top(attention_value_scale=2.0), "attention_value_scale: unknown here, and may change"),
    (PLAIN, own(attention_sink_bias=True), "attention_sink_bias: unknown here"),
    (PLAIN, top(quantization_config={"bits": 4}), "quantization_config: the draft's weights must be in 16 or 32 bits"),
    (PLAIN, top(target_hidden_size=32), "target_hidden_size is 32; it must be the target's, 64"),
    (PLAIN, own(projector_type="domino"), r"Domino drafts .* are not supported"),
    (PLAIN, top(architectures=["DominoDraftModel"]), r"Domino drafts .* are not supported"),
    (PLAIN, top(architectures=["LlamaForCausalLMEagle3"]), "EAGLE-3 draft; use `drafter: eagle3`"),
    (PLAIN, top(architectures=["Qwen3ForCausalLM"]), r"\['Qwen3ForCausalLM'\] .* is no known DFlash format; known are"),
    (PLAIN, own(shift_label=True), "shift_label is true; it must be false"),
    (PLAIN, drop(Q), f"missing tensors: {Q}"),
    (PLAIN, add("layers.0.g_proj.weight", torch.ones(2)), "tensors unknown here: layers.0.g_proj.weight"),
    (PLAIN, swap(Q, _broken), f"{Q} holds NaN or infinite values"),
    (PLAIN, swap(Q, lambda t: t.to(torch.int8)), f"{Q} is of type torch.int8"),
    (PLAIN, swap(Q, lambda t: t[:32]), rf"{Q} has the shape \[32, 64\]; config.json asks for \[64, 64\]"),
    (PLAIN, add("model.norm.weight", torch.ones(64)), "norm.weight stands there twice"),
    (SMALL_VOCABULARY, top(draft_vocab_size=300), "draft_vocab_size is 300; the target's vocabulary has 259"),
    (SMALL_VOCABULARY, top(draft_vocab_size=39), r"has the shape \[40.*config.json asks for \[39"),
    (SMALL_VOCABULARY, drop("d2t"), "missing tensors: d2t"),
    (SMALL_VOCABULARY, swap("d2t", lambda t: t + torch.arange(40) * 9), "ids outside the target's vocabulary of 259"),
    (SMALL_VOCABULARY, swap("d2t", lambda t: t.flip(0)), "ids that do not ascend"),
    (SMALL_VOCABULARY, swap("d2t", lambda t: t.float()), r"d2t is torch.float32 \[40\]; it must be integers"),
    (DSPARK, own(markov_head_type="gated"), "markov_head_type 'gated' is not supported, only 'vanilla'"),
    (DSPARK, own(markov_rank=0), "confidence_head_with_markov is true, but markov_rank is 0"),
    (DSPARK, own(markov_rank=4), r"confidence_head.proj.weight has the shape \[1, 67\]|markov_w1.weight has the shape"),
    (DFLASH2, own(conv_kernel_size=None), "conv_kernel_size is missing; it must be an integer"),
    (DFLASH2, own(conv_group_size=24), "conv_group_size 24 does not divide hidden_size 64"),
    (DFLASH2, own(sample_from_anchor=True), "selector or convolution can't be combined with"),
    (DFLASH2, own(selector_top_k=0), "selector_rank 5 and selector_top_k 0 must both be given"),
    (DFLASH2, own(final_logit_softcapping=-1), "final_logit_softcapping is -1.0; it must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "spoil", "text"),
    MISMATCHES,
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mismatch_is_refused_by_name(
    spec: DFlashSpec, spoil: Callable[[Checkpoint], None], text: str, tmp_path: Path
) -> None:
    made = zlab(spec, tiny_tensors(spec))
    spoil(made)
    with pytest.raises(ModelLoadError, match=text):
        load(made.write(tmp_path / "draft"), TARGET)


LIBRARY: list[tuple[Callable[[Checkpoint], None], str]] = [
    (top(aux_hidden_state_layer_ids=[1, 2, 5]), r"aux_hidden_state_layer_ids \[1, 2, 5\] must lie between 1 and 4"),
    (top(aux_hidden_state_layer_ids=None), "aux_hidden_state_layer_ids is missing"),
    (top(speculators_model_type="eagle3"), "speculators_model_type is 'eagle3'.*drafter: eagle3"),
    (top(transformer_layer_config=None), "transformer_layer_config: num_attention_heads is missing"),
    (top(norm_before_fc=True), "norm_before_fc: unknown here"),
    (swap("t2d", lambda t: t.roll(1)), "t2d does not mark the 40 target tokens that d2t leads to"),
]


@pytest.mark.parametrize(("spoil", "text"), LIBRARY, ids=[text for _, text in LIBRARY])
def test_a_mismatch_of_the_speculators_layout_is_refused_too(
    spoil: Callable[[Checkpoint], None], text: str, tmp_path: Path
) -> None:
    made = speculators(SMALL_VOCABULARY, tiny_tensors(SMALL_VOCABULARY))
    spoil(made)
    with pytest.raises(ModelLoadError, match=text):
        load(made.write(tmp_path / "draft"), TARGET)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    folder = zlab(PLAIN, tiny_tensors(PLAIN)).write(tmp_path / "draft")
    (folder / "mask_embedding.pt").write_bytes(b"pickle")
    with pytest.raises(ModelLoadError, match=r"mask_embedding\.pt is a pickle"):
        load(folder, TARGET)
    (folder / "mask_embedding.pt").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickles only, which can run code"):
        load(folder, TARGET)


MASKS: list[tuple[dict[str, object], int | None, str]] = [
    ({"mask_token_id": 258}, 258, ""),
    ({"mask_token_id": 65}, 65, "mask_token_id 65 is the ordinary token"),
    ({"mask_token_id": None, "mask_token": "<pad>"}, 258, ""),
    ({"mask_token_id": 257, "mask_token": "<pad>"}, None, "mask_token_id is 257, but mask_token '<pad>' is 258"),
    ({"mask_token_id": None, "mask_token": "<none>"}, None, "mask_token is '<none>', and the target's tokenizer.json"),
]


@pytest.mark.parametrize(("keys", "expected", "text"), MASKS)
def test_the_mask_is_found_and_an_ordinary_one_is_warned_of(
    keys: dict[str, object], expected: int | None, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    target = replace(TARGET, folder=tmp_path)
    made = zlab(PLAIN, tiny_tensors(PLAIN))
    own(**keys)(made)
    folder = made.write(tmp_path / "draft")
    if expected is None:
        with pytest.raises(ModelLoadError, match=text):
            load(folder, target)
        return
    with caplog.at_level(logging.WARNING):
        assert load(folder, target)[0].mask_token_id == expected
    assert (text in caplog.text) if text else not caplog.records
