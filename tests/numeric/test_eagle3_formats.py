"""EAGLE-3 checkpoints that do not fit: each is refused with the name of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelLoadError
from engine.models.draft_files import TargetFacts
from engine.models.eagle3.formats import load
from tests.eagle3 import Variant, save_draft
from tests.tiny import tiny_config

Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]
TARGET = TargetFacts.of(tiny_config("llama"))


def put(**values: object) -> Callable[[Settings], None]:
    return lambda settings: settings.update(values)


SETTINGS: dict[str, tuple[Callable[[Settings], None], str]] = {
    "another architecture": (put(architectures=["LlamaForCausalLM"]), "architectures names LlamaForCausalLM"),
    "another kind of speculators": (put(speculators_model_type="dflash"), "speculators_model_type"),
    "another vocabulary": (put(vocab_size=300), "vocab_size is 300, but must be 259"),
    "another target width": (put(target_hidden_size=128), "target_hidden_size is 128, but must be 64"),
    "its own width": (put(hidden_size=32), "target_hidden_size is 32, but must be 64"),
    "two layers": (put(num_hidden_layers=2), "num_hidden_layers is 2, but must be 1"),
    "the embedding's output": (put(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}), "names 0"),
    "past the last layer": (put(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 5]}), "names 5"),
    "no list of layers": (put(eagle_config={"eagle_aux_hidden_state_layer_ids": "2"}), "must be a list of integers"),
    "another count of layers": (put(num_aux_hidden_states=4), "num_aux_hidden_states is 4"),
    "two taps of three": (put(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2]}), "fc.weight is"),
    "EAGLE 2": (put(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state"),
    "parallel drafting": (put(mask_token_id=3), "mask_token_id"),
    "an unknown switch": (put(gated_attention=True), "gated_attention"),
    "an activation": (put(hidden_act="swiglu"), "hidden_act is 'swiglu'"),
    "heads": (put(num_key_value_heads=3), "num_key_value_heads 3"),
    "no heads": (put(num_attention_heads=0), "num_attention_heads"),
    "a large draft vocabulary": (put(draft_vocab_size=300), "draft_vocab_size is 300"),
    "another draft vocabulary": (put(draft_vocab_size=90), "lm_head.weight is"),
    "a rope by length": (put(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type"),
    "no rope": (put(rope_theta=None), "rope_theta"),
    "norms that are not stored": (put(norm_before_fc=True), "input_norm.weight is missing"),
    "scaled logits": (put(logit_scale=0.5), "logit_scale is 0.5"),
    "a text for a number": (put(intermediate_size="80"), "intermediate_size"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    change, message = SETTINGS[case]
    folder = save_draft(tmp_path / "draft", tiny_config("llama"))
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=message):
        load(folder, TARGET)


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def stored(name: str, tensor: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensor(tensors))


FC = "fc.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "a missing product": (without("midlayer.self_attn.k_proj.weight"), r"layers.0.self_attn.k_proj.weight is missing"),
    "no map": (without("d2t"), "d2t is missing"),
    "no head": (without("lm_head.weight"), "lm_head.weight is missing"),
    "a narrow fc": (stored(FC, lambda t: t[FC][:, :-1].contiguous()), r"fc.weight is \[64, 191\]"),
    "quantised": (stored(FC, lambda t: t[FC].to(torch.int8)), "fc.weight is torch.int8"),
    "not a number": (stored(FC, lambda t: t[FC] / 0), "fc.weight holds NaN"),
    "a surplus norm": (
        stored("midlayer.self_attn.q_norm.weight", lambda _: torch.ones(16)),
        "q_norm.weight is unknown",
    ),
    "ids for offsets": (stored("d2t", lambda t: t["d2t"] + torch.arange(100) * 2), "outside the target's vocabulary"),
    "an id twice": (stored("d2t", lambda t: t["d2t"] - torch.arange(100)), "ascend"),
    "a fraction of an id": (stored("d2t", lambda t: t["d2t"].float()), "d2t is torch.float32"),
    "a short map": (stored("d2t", lambda t: t["d2t"][:99].contiguous()), "d2t"),
    "another t2d": (stored("t2d", lambda t: ~t["t2d"]), "t2d"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    folder = save_draft(tmp_path / "draft", tiny_config("llama"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load(folder, TARGET)


def test_both_layouts_are_the_same_draft(tmp_path: Path) -> None:
    for number, variant in enumerate(
        (Variant(), Variant(norm_before_fc=True, bias=True, own_embedding=True, window=9))
    ):
        found = [
            load(save_draft(tmp_path / f"{layout}{number}", tiny_config("llama"), variant, layout), TARGET)
            for layout in ("original", "speculators")
        ]
        (spec, tensors, kind), (other, others, other_kind) = found
        assert spec == other and spec.taps == (0, 1, 3) and (kind, other_kind) == ("EAGLE-3", "speculators EAGLE-3")
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
        assert tensors["d2t"].diff().gt(0).all() and len(tensors["d2t"]) == 100 and int(tensors["d2t"][-1]) > 100


def test_default_layers_and_a_prefix(tmp_path: Path) -> None:
    """Without a list, layers 2, half and the last but three; `model.` before a name changes nothing."""
    folder = save_draft(tmp_path / "draft", tiny_config("llama"))
    settings = json.loads((folder / "config.json").read_text())
    del settings["eagle_config"]
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    spec, found, _ = load(folder, TARGET)
    assert spec.taps == (1, 1, 0)
    assert torch.equal(found["fc.weight"], tensors["fc.weight"])
