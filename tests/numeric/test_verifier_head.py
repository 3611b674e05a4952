"""The head's file: what is written is what weighs, and it weighs for one pair of networks alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelLoadError
from engine.models.fingerprint import fingerprint
from engine.models.verifier_head import HeadSpec, PairPart, load_head, save_head
from tests.tiny import save_tiny, tiny_config, tiny_model
from tests.tiny_drafts import tiny_spec, tiny_tensors
from training.checkpoint import save_zlab
from training.verifier.probe import Probe

CPU = torch.device("cpu")
WIDTH = 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PairPart, PairPart]:
    root = tmp_path_factory.mktemp("pair")
    target = save_tiny("llama", root / "target")
    spec = tiny_spec(tiny_config("llama"))
    save_zlab(root / "draft", spec, tiny_tensors(spec), {"num_target_layers": 4})
    return PairPart(target, WIDTH), PairPart(root / "draft", WIDTH)


def trained(places: int = 5) -> Probe:
    """A probe with some direction, over inputs that are far from standard."""
    torch.manual_seed(1)
    probe = Probe(WIDTH, WIDTH, places)
    probe.fit(torch.randn(40, WIDTH) * 3 + 1, torch.randn(40, WIDTH) * 0.1 - 2)
    with torch.no_grad():
        probe.direction.normal_(std=0.2)
        probe.bias.normal_()
    return probe


@pytest.fixture
def folder(tmp_path: Path, pair: tuple[PairPart, PairPart]) -> Path:
    target, draft = pair
    spec = HeadSpec(WIDTH, WIDTH, 5, fingerprint(target.folder), fingerprint(draft.folder), "sums")
    save_head(tmp_path / "head", spec, trained().folded())
    return tmp_path / "head"


def test_a_saved_head_weighs_as_the_trained_one_did(folder: Path, pair: tuple[PairPart, PairPart]) -> None:
    head = load_head(folder, *pair, CPU)
    hidden, states = torch.randn(3, 5, WIDTH) * 3 + 1, torch.randn(3, 5, WIDTH) * 0.1 - 2
    weights = head.weights(hidden, states)
    assert weights.shape == (3, 5) and weights.dtype == torch.float32
    torch.testing.assert_close(weights, trained().weights(hidden, states), atol=1e-5, rtol=1e-4)
    assert weights.std() > 0.1
    half = head.weights(hidden.bfloat16(), states.bfloat16())
    torch.testing.assert_close(half, weights, atol=0.05, rtol=0)
    longer = head.weights(hidden.repeat(1, 2, 1), states.repeat(1, 2, 1))
    torch.testing.assert_close(longer[:, :5], weights)
    inputs = hidden[:, :1].expand(3, 9, WIDTH), states[:, :1].expand(3, 9, WIDTH)
    places = head.weights(*inputs)
    torch.testing.assert_close(places[:, 4:], places[:, 4:5].expand(3, 5))  # places past the last have its bias
    assert (places[:, 3] - places[:, 4]).abs().min() > 1e-3
    torch.testing.assert_close(head.weights(hidden[1:2], states[1:2]), weights[1:2])


def test_a_fingerprint_is_of_the_network_and_not_of_its_folder(tmp_path: Path, pair: tuple[PairPart, PairPart]) -> None:
    target = pair[0].folder
    known = fingerprint(target)
    shutil.copytree(target, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == known
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "shards") == known
    assert fingerprint(save_tiny("llama", tmp_path / "other", seed=1)) != known
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert fingerprint(tmp_path / "copy") != known
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[-1] += 1
    before = fingerprint(tmp_path / "other")
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(tmp_path / "other") != before
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        fingerprint(tmp_path)


def test_another_target_or_draft_is_refused(folder: Path, tmp_path: Path, pair: tuple[PairPart, PairPart]) -> None:
    target, draft = pair
    other = replace(target, folder=save_tiny("llama", tmp_path / "other", seed=2))
    with pytest.raises(ModelLoadError, match=r"config\.json: target_fingerprint is not that of other"):
        load_head(folder, other, draft, CPU)
    spec = tiny_spec(tiny_config("llama"))
    save_zlab(tmp_path / "worse", spec, tiny_tensors(spec, seed=3), {"num_target_layers": 4})
    with pytest.raises(ModelLoadError, match="draft_fingerprint is not that of worse"):
        load_head(folder, target, replace(draft, folder=tmp_path / "worse"), CPU)
    with pytest.raises(ModelLoadError, match="target_width is 64, but hidden states of this target have 96"):
        load_head(folder, replace(target, width=96), draft, CPU)
    with pytest.raises(ModelLoadError, match="draft_width is 64, but hidden states of this draft have 32"):
        load_head(folder, target, replace(draft, width=32), CPU)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["DFlashDraftModel"]}, "architectures is"),
        ({"head_version": 2}, "head_version is 2"),
        ({"places": 0}, "places is 0"),
        ({"places": "5"}, "places is"),
        ({"target_width": None}, "target_width is missing"),
        ({"target_fingerprint": 7}, "target_fingerprint is 7"),
        ({"hidden_layers": 3}, "hidden_layers: unknown here"),
    ],
)
def test_a_broken_config_is_named(
    folder: Path, pair: tuple[PairPart, PairPart], change: dict[str, object], words: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelLoadError, match=f"head: config.json: .*{words}"):
        load_head(folder, *pair, CPU)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("bias", torch.zeros(4), r"bias is torch.float32 \[4\]"),
        ("bias", torch.zeros(5, dtype=torch.float64), r"bias is torch.float64"),
        ("draft.weight", torch.full((WIDTH,), float("nan")), "draft.weight holds NaN"),
        ("second.weight", torch.zeros(1), "second.weight: it must hold"),
    ],
)
def test_broken_tensors_are_named(
    folder: Path, pair: tuple[PairPart, PairPart], name: str, tensor: torch.Tensor, words: str
) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"head: model.safetensors: .*{words}"):
        load_head(folder, *pair, CPU)
