"""Published draft formats: every layout gives the same spec, tensors and drafts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.attention.sdpa import SdpaAttention
from engine.models.dflash.attention_kinds import read_layers
from engine.models.dflash.formats import load, read_config
from engine.models.dflash.model import DFlashModel
from engine.models.dflash.model import load as load_model
from engine.models.dflash.spec import DFlashSpec, DraftLayer
from engine.models.dflash.weights import drop_copies, tensor_shapes
from engine.models.draft_files import Settings
from engine.models.draft_host import DraftHost
from engine.protocols import DraftAsk
from engine.runtime.batch import SeqInput, pack
from tests.numeric.dflash_checkpoints import (
    DFLASH2,
    DSPARK,
    LAYOUTS,
    PLAIN,
    SMALL_VOCABULARY,
    TARGET,
    TARGET_CONFIG,
    Tensors,
    Writer,
    copies,
    speculators,
    zlab,
)
from tests.tiny_drafts import tiny_tensors
from training.checkpoint import save_zlab

# As published with z-lab/Qwen3-8B-DFlash-b16.
QWEN3_8B: dict[str, object] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "bos_token_id": 151643,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B_TARGET = replace(TARGET, hidden_size=4096, num_layers=36, vocab_size=151936)
CASES = [
    pytest.param(spec, write, id=f"{name}-{write.__name__}")
    for name, (spec, writers) in LAYOUTS.items()
    for write in writers
]


WORDS = {
    "deepspec": "DSpark, DeepSpec's flat keys",
    "specforge": "DSpark, SpecForge's nesting",
}


@pytest.mark.parametrize(("spec", "write"), CASES)
def test_every_layout_gives_the_same_spec_and_tensors(spec: DFlashSpec, write: Writer, tmp_path: Path) -> None:
    tensors = tiny_tensors(spec)
    found, stored, words = load(write(spec, tensors).write(tmp_path / "draft"), TARGET)
    extra = {name for name in ("embed_tokens.weight", "lm_head.weight") if name in stored and name not in tensors}
    head = spec.own_head or "lm_head.weight" in extra
    assert found == replace(spec, own_embedding="embed_tokens.weight" in extra, own_head=head)
    assert stored.keys() == tensor_shapes(found).keys() == tensors.keys() | extra
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    kind = "dspark" if spec.markov_rank else "dflash2" if spec.selector_rank else "dflash"
    plain = "z-lab DFlash2" if spec.selector_rank else "z-lab DFlash"
    assert words == {**WORDS, "speculators": f"speculators {kind}"}.get(write.__name__, plain)
    target = copies(spec).values()
    assert drop_copies(found, stored, *target)[0] == replace(spec, own_embedding=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_drafts(name: str, tmp_path: Path) -> None:
    spec, writers = LAYOUTS[name]
    tensors = tiny_tensors(spec)
    outcomes = [drafted(write(spec, tensors).write(tmp_path / write.__name__)) for write in writers]
    assert outcomes[0].std() > 0.1
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes[1:])


def drafted(folder: Path) -> torch.Tensor:
    """The refined logits of one block behind nine positions of random states; the copies are the target's own."""
    own = copies(PLAIN)
    embedding = nn.Embedding.from_pretrained(own["embed_tokens.weight"])
    head = nn.Linear(64, PLAIN.vocab_size, bias=False)
    head.weight = nn.Parameter(own["lm_head.weight"])
    cpu = torch.device("cpu")
    host = DraftHost(TARGET_CONFIG, embedding, head, SdpaAttention(), torch.float32, cpu, 64, lambda _: None)
    model = load_model(folder, host).bind(8, 4, range(6, 8))
    assert isinstance(model, DFlashModel)
    generator = torch.Generator().manual_seed(3)
    states = tuple(torch.randn(9, 64, generator=generator) for _ in model.spec.taps)
    model.write(states, pack([SeqInput(list(range(9)), 0, (5, 0, 3), 9)], 4, cpu))
    logits, hidden = model.blocks([7], [DraftAsk("r", model.most, 9, 1, (5, 0, 3))])
    previous = torch.full((logits.shape[1],), 11)
    return model.widen(model.refine(logits[0], hidden[0], previous)).nan_to_num(neginf=-50.0)


def test_the_state_dict_of_five_layers_has_the_published_58_names() -> None:
    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    expected = {f"layers.{index}.{name}.weight" for index in range(5) for name in linears + norms}
    shapes = tensor_shapes(replace(PLAIN, layers=(DraftLayer(),) * 5))
    assert shapes.keys() == expected | {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert len(shapes) == 58


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", [PLAIN, SMALL_VOCABULARY, DSPARK, DFLASH2], ids=["plain", "vocabulary", "dspark", "2"])
def test_a_saved_draft_loads_as_it_was(spec: DFlashSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tiny_tensors(spec).items()}
    save_zlab(tmp_path / "draft", spec, tensors, {"num_target_layers": 4, "slipstream": None})
    found, stored, _ = load(tmp_path / "draft", TARGET)
    assert found == spec
    assert all(
        torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with pytest.raises(ValueError, match=r"norm\.weight"):
        save_zlab(
            tmp_path / "less", spec, {n: t for n, t in tensors.items() if n != "norm.weight"}, {"num_target_layers": 4}
        )


def test_the_published_configuration_for_qwen3_8b_is_read_whole() -> None:
    spec, words, tied = read_config(Settings(QWEN3_8B, "x"), QWEN3_8B_TARGET)
    assert (words, tied, spec.block_size, spec.mask_token_id, spec.most) == ("z-lab DFlash", False, 16, 151669, 15)
    assert (spec.taps, spec.layers, dict(spec.rope)["rope_theta"]) == ((1, 9, 17, 25, 33), (DraftLayer(),) * 5, 1e6)
    assert len(tensor_shapes(spec)) == 58
    assert sum(math.prod(shape) for shape in tensor_shapes(spec).values()) == 1_048_626_432  # 2.1 GB of bf16


@pytest.mark.parametrize(("write", "size"), [(zlab, 16), (speculators, 8)])
def test_a_block_size_that_is_not_said_is_the_formats_own(write: Writer, size: int, tmp_path: Path) -> None:
    made = write(PLAIN, tiny_tensors(PLAIN))
    del made.config["block_size"]
    assert load(made.write(tmp_path / "draft"), TARGET)[0].block_size == size


def test_our_files_hold_offsets_as_the_speculators_library_does(tmp_path: Path) -> None:
    tensors = tiny_tensors(SMALL_VOCABULARY)
    save_zlab(tmp_path / "draft", SMALL_VOCABULARY, tensors, {"num_target_layers": 4})
    offsets = load_file(tmp_path / "draft" / "model.safetensors")["d2t"]
    assert torch.equal(offsets + torch.arange(len(offsets)), tensors["d2t"])
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["draft_vocab_size"] == 40


FULL, SLIDE = "full_attention", "sliding_attention"
MIXED = {"layer_types": [SLIDE, FULL], "sliding_window": 9}
BY_DEPTH = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
FORCED = {"use_swa": True, "swa_window_size": 7}
PLAIN_LAYER = (None, False)
KINDS: dict[str, tuple[dict[str, object], dict[str, object], list[tuple[int | None, bool]]]] = {
    "nothing said": ({}, {}, [PLAIN_LAYER] * 2),
    "sliding is causal": ({**MIXED}, {}, [(9, True), PLAIN_LAYER]),
    "is_causal false": ({**MIXED, "is_causal": False}, {}, [(9, False), PLAIN_LAYER]),
    "is_causal goes first": ({"is_causal": False}, {"causal": True}, [PLAIN_LAYER] * 2),
    "causal for all": ({**MIXED}, {"causal": True}, [(9, True), (None, True)]),
    "window off": ({"sliding_window": 9, "use_sliding_window": False}, {}, [PLAIN_LAYER] * 2),
    "from a layer on": ({**BY_DEPTH}, {}, [PLAIN_LAYER, (9, False)]),
    "use_swa": ({"layer_types": [FULL, FULL]}, {**FORCED}, [(7, False)] * 2),
    "use_swa, listed": ({**MIXED}, {**FORCED}, [(7, True), PLAIN_LAYER]),
}


@pytest.mark.parametrize("case", KINDS)
def test_windows_and_causality_are_resolved_in_the_published_order(case: str) -> None:
    network, own, expected = KINDS[case]
    found = read_layers(Settings({"num_hidden_layers": 2, **network}, "x"), Settings(own, "x"), None)
    assert found == tuple(DraftLayer(*layer) for layer in expected)


def test_scaled_rotary_embeddings_keep_their_parameters(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    spec = replace(PLAIN, rope=tuple(sorted(rope.items())))
    made = zlab(spec, tiny_tensors(PLAIN))
    assert load(made.write(tmp_path / "old"), TARGET)[0] == spec
    made.config |= {"rope_parameters": rope, "rope_scaling": None, "rope_theta": None}
    assert load(made.write(tmp_path / "new"), TARGET)[0] == spec


def test_a_tap_of_the_embedding_and_a_mask_of_its_own_are_kept(tmp_path: Path) -> None:
    tensors: Tensors = tiny_tensors(PLAIN) | {"mask_embedding": torch.ones(64)}
    made = zlab(replace(PLAIN, taps=(-1, 0, 2)), tensors)
    spec, stored, _ = load(made.write(tmp_path / "draft"), TARGET)
    assert spec.taps == (-1, 0, 2)
    assert torch.equal(stored["mask_embedding"], torch.ones(64))
