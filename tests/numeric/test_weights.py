"""Loading: safetensors only, nothing missing, no code from a checkpoint; packing rounds weights and nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelLoadError
from engine.runtime.linear import PackedLinear, pack_linear
from engine.runtime.packing import pack_linears
from engine.runtime.weights import load_config, load_model
from tests.tiny import save_tiny

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path) -> torch.nn.Module:
    return load_model(folder, load_config(folder), torch.float32, CPU)


def test_auto_map_is_ignored_and_said_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with caplog.at_level(logging.WARNING):
        assert type(load(folder)).__module__.startswith("transformers.")
    assert "auto_map" in caplog.text


def test_unknown_family_with_code_of_its_own_is_refused(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_config(folder, model_type="no_such_family", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelLoadError):
        load(folder)


def test_pickle_alone_is_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        load(folder)


def test_missing_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"missing keys.*layers\.2\.mlp\.up_proj"):
        load(folder)


def test_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=97)
    with pytest.raises(ModelLoadError):
        load(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_broken_weight_file_is_refused(folder: Path, damage: bytes) -> None:
    (folder / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelLoadError):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}'])
def test_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelLoadError):
        load_config(folder)


def test_sharded_weights_load(folder: Path) -> None:
    whole = load(folder)
    whole.save_pretrained(folder / "sharded", max_shard_size="100KB")  # type: ignore[operator]
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    for (name, a), b in zip(whole.state_dict().items(), load(folder / "sharded").state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_rounds_weights_to_fp16_only(bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(72, 40, bias=bias).requires_grad_(False)
    x = torch.randn(9, 72)
    expected = torch.nn.functional.linear(x, layer.weight.half().float(), layer.bias)
    torch.testing.assert_close(PackedLinear(layer.weight, layer.bias)(x), expected, rtol=0, atol=2e-6)


def test_weights_beyond_fp16_stay_as_they_are() -> None:
    layer = torch.nn.Linear(8, 8).requires_grad_(False)
    layer.weight[3, 3] = 1e6
    assert pack_linear(layer) is layer


def test_packing_leaves_nothing_in_the_mapped_file(folder: Path) -> None:
    model = load(folder)
    before = {parameter.data_ptr() for parameter in model.parameters()}
    assert pack_linears(model) == 4 * 7 + 1
    assert not before & {parameter.data_ptr() for parameter in model.parameters()}
