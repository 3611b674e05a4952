"""Masked-diffusion checkpoints in their published form: the loaded network is the plain-loop reference's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import ModelConfig
from engine.diffusion import BLOCK_CAUSAL, FULL
from engine.models import selfcheck_diffusion
from engine.runtime.batch import AttentionMode, SeqInput
from engine.runtime.loading import LoadedModel, load_checked
from tests.numeric.diffusion_reference import reference_logits
from tests.tiny_diffusion import CONTEXT, EXPERT_KINDS, KINDS, MASK, TINY, VOCAB, raw_tensors, save_tiny_diffusion

Load = Callable[[str], tuple[LoadedModel, Path]]
ALL = (*KINDS, *EXPERT_KINDS)
BLOCKY = [kind for kind in ALL if TINY[kind].attention == BLOCK_CAUSAL]
WHOLE = [kind for kind in ALL if TINY[kind].attention == FULL]
CLOSE = 1e-4  # logits reach about 20


def loaded(folder: Path, quant: str = "none", **settings: str) -> LoadedModel:
    return load_checked(ModelConfig(str(folder), quant=quant, device="cpu", **settings), folder, lambda _: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Each kind as it is published, loaded once."""

    @cache
    def load(kind: str) -> tuple[LoadedModel, Path]:
        folder = save_tiny_diffusion(kind, tmp_path_factory.mktemp(kind))
        return loaded(folder), folder

    return load


def some_ids(kind: str, length: int, masks: int, seed: int = 0) -> list[int]:
    """Random bytes, of which the last `masks` are masked, but for one."""
    shape, generator = TINY[kind], np.random.default_rng(seed)
    ids = generator.integers(6, 250, length).tolist()
    for place in range(length - masks, length):
        ids[place] = ids[place] if place == length - 2 else shape.mask_id
    return ids


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", WHOLE)
def test_full_attention_is_the_reference(load: Load, kind: str) -> None:
    model, folder = load(kind)
    runner = model.runner(32, 4)
    parts = [some_ids(kind, length, masks, length) for length, masks in ((37, 16), (5, 3))]
    inputs = [
        SeqInput(parts[0], 0, range(10, 20), len(parts[0])),
        SeqInput(parts[1], 0, (3, 1), len(parts[1])),
    ]
    got = runner.forward(inputs, range(42), AttentionMode.BIDIRECTIONAL)
    close(got, np.concatenate([reference_logits(folder, ids, "full") for ids in parts]))
    # Rows fed again say the same: K/V in place, keys past the queries seen.
    again = runner.forward([SeqInput(parts[0][20:29], 20, range(10, 20), 37)], range(9), AttentionMode.BIDIRECTIONAL)
    close(again, reference_logits(folder, parts[0], "full")[20:29])


@pytest.mark.parametrize("kind", BLOCKY)
def test_block_causal_attention_is_the_reference(load: Load, kind: str) -> None:
    """Whole; a prompt in chunks; an open block twice with other tokens in it; a closed one with the next behind it."""
    model, folder = load(kind)
    spec = model.diffusion
    assert spec is not None
    length = spec.block_length
    ids = some_ids(kind, 4 * length, length)
    expected = reference_logits(folder, ids, "block_causal", length)
    runner, table = model.runner(2 * length, 4), range(3, 3 + length)

    def feed(given: list[int], start: int) -> torch.Tensor:
        rows = range(len(given))
        return runner.forward([SeqInput(given, start, table, start + len(given))], rows, *how)

    how = (AttentionMode.BLOCK_CAUSAL, length)
    close(feed(ids, 0), expected)
    runner = model.runner(2 * length, 4)
    close(feed(ids[:length], 0), expected[:length])
    close(feed(ids[length : 2 * length], length), expected[length : 2 * length])
    opened = [*ids[: 2 * length], *([spec.mask_id] * length)]
    close(
        feed(opened[2 * length :], 2 * length),
        reference_logits(folder, opened, "block_causal", length)[2 * length :],
    )
    close(feed(ids[2 * length :], 2 * length), expected[2 * length :])  # commits the block, and denoises the next
    close(feed(ids[3 * length :], 3 * length), expected[3 * length :])


@pytest.mark.parametrize("kind", ALL)
def test_the_specs_that_published_files_come_to(load: Load, kind: str) -> None:
    shape, (model, _) = TINY[kind], load(kind)
    spec = model.diffusion
    assert spec is not None
    assert (spec.attention, spec.mask_id, spec.shift) == (shape.attention, shape.mask_id, shape.shift)
    assert spec.block_length == (shape.block or 32) and model.context_length == CONTEXT
    assert spec.sub_block == (8 if kind == "fast_dllm_v2" else 0)


@pytest.mark.parametrize("kind", ["llada", "fast_dllm_v2", "sdar"])
def test_fusion_and_packing_work_as_for_other_models(load: Load, kind: str) -> None:
    folder = load(kind)[1]
    phases: dict[str, str] = {}
    config = ModelConfig(str(folder), quant="fp16", device="cpu")
    model = load_checked(config, folder, lambda phase: phases.update({phase.name: phase.detail}))
    assert "1 backbone, 2 layers, 2 attention, 2 MLPs" in phases["fusion and packing"]
    assert f"{TINY[kind].attention} attention" in phases["self-check"]
    ids, spec = some_ids(kind, 24, 8), model.diffusion
    assert spec is not None
    how = (AttentionMode.BLOCK_CAUSAL if spec.block_causal else AttentionMode.BIDIRECTIONAL), spec.block_length
    got = model.runner(8, 4).forward([SeqInput(ids, 0, range(8), 24)], range(24), *how)
    expected = reference_logits(folder, ids, TINY[kind].attention, spec.block_length)
    error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 1e-2  # rounded, and no more than that


def test_lladas_names_may_lack_their_first_part(load: Load, tmp_path: Path) -> None:
    folder = save_tiny_diffusion("llada", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert_same(loaded(folder), load("llada")[0])


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_checkpoints_in_shards(load: Load, tmp_path: Path, kind: str) -> None:
    folder = save_tiny_diffusion(kind, tmp_path)
    (folder / "model.safetensors").unlink()
    tensors = dict(raw_tensors(TINY[kind]))
    names = sorted(tensors)
    placed: dict[str, str] = {}
    for shard, part in enumerate((names[::3], names[1::3], names[2::3])):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(loaded(folder), load(kind)[0])


def test_llada_with_tied_ends(tmp_path: Path) -> None:
    """weight_tying decides: no head of its own is looked for, nor may there be none where it is off."""
    folder = save_tiny_diffusion("llada", tmp_path, weight_tying=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ids = some_ids("llada", 12, 4)
    got = loaded(folder).runner(4, 4).forward([SeqInput(ids, 0, range(4), 12)], range(12), AttentionMode.BIDIRECTIONAL)
    close(got, reference_logits(folder, ids, "full"))


def test_llada_with_grouped_heads_and_a_padded_embedding(tmp_path: Path) -> None:
    """As OLMo counts: vocab_size may be less than the embedding has rows; no n_kv_heads means as many as n_heads."""
    folder = save_tiny_diffusion("llada", tmp_path, vocab_size=VOCAB - 4, n_kv_heads=None)
    model = loaded(folder)
    assert model.adapter.vocab_size == VOCAB and model.shapes[0].kv_heads == 4
    grouped = save_tiny_diffusion("llada", tmp_path / "grouped", n_kv_heads=2)
    tensors = load_file(grouped / "model.safetensors")
    for name in [name for name in tensors if ".k_proj." in name or ".v_proj." in name]:
        tensors[name] = tensors[name][:16].clone()
    save_file(tensors, grouped / "model.safetensors", {"format": "pt"})
    ids = some_ids("llada", 12, 4)
    runner = loaded(grouped).runner(4, 4)
    got = runner.forward([SeqInput(ids, 0, range(4), 12)], range(12), AttentionMode.BIDIRECTIONAL)
    close(got, reference_logits(grouped, ids, "full"))


def test_random_weights_of_a_familys_shape(tmp_path: Path) -> None:
    folder = save_tiny_diffusion("llada", tmp_path)
    (folder / "model.safetensors").unlink()
    model = loaded(folder, load_format="dummy")
    assert model.diffusion is not None and model.diffusion.mask_id == MASK


def test_the_checks_sequences_reach_past_two_blocks(load: Load) -> None:
    for kind in BLOCKY:
        spec = load(kind)[0].diffusion
        assert spec is not None
        ids, firsts = selfcheck_diffusion.sequences(spec, VOCAB, CONTEXT)
        assert len(ids[0]) > 2 * spec.block_length and len(ids[1]) > spec.block_length
        assert firsts == (0, CONTEXT - len(ids[1]))
        assert all(bool((row == spec.mask_id).any()) for row in ids)


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    """Weight by weight."""
    ours, theirs = one.adapter.model.state_dict(), other.adapter.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
