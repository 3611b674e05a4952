"""A worker with a draft network: what it loads and refuses, what it holds, and what the draft takes from its target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import DraftConfig, EngineConfig, KVConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.errors import ConfigError, ModelLoadError
from engine.models.dflash.model import DFlashModel, LoadedDFlash, assemble
from engine.models.dflash.spec import DFlashSpec
from engine.protocols import DraftAsk
from engine.runtime.drafts import draft_host
from engine.runtime.loading import LoadedModel, load_checked
from engine.runtime.worker import LocalWorker
from engine.types import Phase
from tests.families import family, save_random
from tests.tiny import save_tiny, tiny_config
from tests.tiny_drafts import tiny_spec, tiny_tensors
from training.checkpoint import save_zlab

ASKS = [DraftAsk("a", 5, 0, block_ids=(0,)), DraftAsk("b", 5, 3, block_ids=(1,))]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec, place = tiny_spec(tiny_config("llama")), tmp_path_factory.mktemp("draft")
    save_zlab(place, spec, tiny_tensors(spec), {"num_target_layers": 4})
    return place


def worker(folder: Path, draft: DraftConfig, quant: str = "none") -> tuple[LocalWorker, dict[str, Phase]]:
    model = ModelConfig(str(folder), quant=quant, pipeline="speculative", draft=draft, device="cpu")
    scheduler, parallel = SchedulerConfig(max_num_seqs=4), ParallelConfig(threads=1)
    config = EngineConfig(model=model, scheduler=scheduler, kv=KVConfig(memory="8MiB"), parallel=parallel)
    phases: list[Phase] = []
    return LocalWorker(config, folder, phases.append), {phase.name: phase for phase in phases}


def target(folder: Path, quant: str = "none") -> LoadedModel:
    return load_checked(ModelConfig(str(folder), quant=quant, device="cpu"), folder, lambda _: None)


def table_of(loaded: LoadedModel) -> torch.Tensor:
    """Its input embeddings [vocabulary, width]."""
    table = loaded.adapter.model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    return table


def drafted(
    loaded: LoadedModel, spec: DFlashSpec, tensors: dict[str, torch.Tensor]
) -> tuple[LoadedDFlash, DFlashModel]:
    draft = assemble(spec, tensors, draft_host(loaded))
    return draft, draft.bind(4, 16, range(2, 4))


def test_a_draft_is_loaded_and_shares_the_pools_memory(folder: Path, draft_folder: Path) -> None:
    loaded, phases = worker(folder, DraftConfig("dflash", path=str(draft_folder)))
    detail = phases["draft"].detail
    assert "2 layers, taps 0, 1, 2, blocks of 6" in detail and "MiB" in detail
    capacity, memory = loaded.capacity(), loaded.memory
    assert capacity.traits.lookahead == 5
    slot = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, bytes
    assert memory.draft_pool == (capacity.num_blocks + 4) * 16 * slot
    assert memory.target_pool == capacity.num_blocks * 16 * 2 * slot
    assert memory.target_pool + memory.draft_pool - 4 * 16 * slot <= 8 << 20
    spec = tiny_spec(tiny_config("llama"))
    kept = sum(tensor.nbytes for tensor in tiny_tensors(spec).values())
    again = 2 * 2 * 2 * 16 * 64 * 4  # key and value matrices stand once more, merged over the layers
    assert memory.draft_weights == kept + again
    packed = worker(folder, DraftConfig("dflash", path=str(draft_folder)), "fp16")[0].memory
    assert packed.draft_weights < 0.6 * memory.draft_weights


def test_the_longest_draft_is_the_networks(folder: Path, draft_folder: Path) -> None:
    path = str(draft_folder)
    assert worker(folder, DraftConfig("dflash", path=path, max_draft=2))[0].capacity().traits.lookahead == 2
    with pytest.raises(ConfigError, match=r"models.draft.max_draft: 6 is more than the 5 tokens"):
        worker(folder, DraftConfig("dflash", path=path, max_draft=6))


def test_a_network_and_its_drafter_belong_together(folder: Path, draft_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"models.draft.path: the drafter 'dflash' needs"):
        worker(folder, DraftConfig("dflash"))
    with pytest.raises(ConfigError, match="unknown drafter 'dflsh'"):
        worker(folder, DraftConfig("dflsh", path=str(draft_folder)))
    with pytest.raises(ModelLoadError):
        worker(folder, DraftConfig("dflash", path=str(folder)))
    with pytest.raises(ModelLoadError):
        worker(folder, DraftConfig("dflash", path=str(folder / "nowhere")))


@pytest.mark.parametrize(
    "changes", [{}, {"draft_vocab_size": 90}, {"own_head": True, "own_embedding": True, "markov_rank": 4}]
)
def test_packed_drafts_say_nearly_the_same(folder: Path, changes: dict[str, Any]) -> None:
    spec = tiny_spec(tiny_config("llama"), **changes)
    rows = [
        drafted(target(folder, quant), spec, tiny_tensors(spec))[1].blocks([5, 6], ASKS)[0]
        for quant in ("none", "fp16")
    ]
    assert not torch.equal(*rows)
    assert float((rows[0] - rows[1]).abs().max()) < 0.02 * float(rows[0].abs().max())


@pytest.mark.parametrize("quant", ["none", "fp16"])
def test_copies_of_the_targets_ends_are_not_kept(folder: Path, quant: str) -> None:
    loaded = target(folder, quant)
    spec = tiny_spec(tiny_config("llama"), own_head=True, own_embedding=True)
    tensors = tiny_tensors(spec)
    plain = table_of(target(folder)).clone()  # tied: the head, too
    kept, _ = drafted(loaded, spec, tensors)
    assert kept.network.head is not None and kept.network.embedding is not None
    dropped, model = drafted(loaded, spec, tensors | {"lm_head.weight": plain, "embed_tokens.weight": plain})
    assert dropped.network.head is None and dropped.network.embedding is None
    _, without = drafted(loaded, replace(spec, own_head=False, own_embedding=False), tensors_without_ends(tensors))
    assert torch.equal(model.blocks([5, 6], ASKS)[0], without.blocks([5, 6], ASKS)[0])


def tensors_without_ends(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in ("lm_head.weight", "embed_tokens.weight")}


def test_a_mask_embedding_stands_in_for_the_mask_tokens_row(folder: Path) -> None:
    loaded = target(folder)
    spec = tiny_spec(tiny_config("llama"), embedding_scale=2.0)
    tensors = tiny_tensors(spec)
    table = table_of(loaded)
    plain = drafted(loaded, spec, tensors)[1].blocks([5, 6], ASKS)[0]
    same = drafted(loaded, spec, tensors | {"mask_embedding": table[spec.mask_token_id]})[1].blocks([5, 6], ASKS)[0]
    other = drafted(loaded, spec, tensors | {"mask_embedding": table[7]})[1].blocks([5, 6], ASKS)[0]
    seven = drafted(loaded, replace(spec, mask_token_id=7), tensors)[1].blocks([5, 6], ASKS)[0]
    assert torch.equal(plain, same) and torch.equal(other, seven) and not torch.equal(plain, other)


def test_only_the_slots_that_somebody_asked_for_are_scored(folder: Path) -> None:
    spec = tiny_spec(tiny_config("llama"))
    _, model = drafted(target(folder), spec, tiny_tensors(spec))
    whole, hidden = model.blocks([5, 6], ASKS)
    assert whole.shape == (2, 5, spec.vocab_size) and hidden.shape == (2, 5, spec.hidden_size)
    few, _ = model.blocks([5, 6], [replace(ASKS[0], limit=1), replace(ASKS[1], limit=2)])
    assert few.shape[:2] == (2, 2)
    torch.testing.assert_close(few, whole[:, :2], atol=1e-5, rtol=1e-5)


def test_small_vocabularies_map_to_the_targets(folder: Path) -> None:
    spec = tiny_spec(tiny_config("llama"), draft_vocab_size=40)
    tensors = tiny_tensors(spec)
    _, model = drafted(target(folder), spec, tensors)
    ids = torch.tensor([[0, 39], [3, 3]])
    assert torch.equal(model.target_ids(ids), tensors["d2t"][ids])
    wide = model.widen(torch.arange(40.0)[None])
    assert wide.shape == (1, spec.vocab_size) and int(wide.isfinite().sum()) == 40
    assert torch.equal(wide[0, tensors["d2t"]], torch.arange(40.0))


def test_a_target_whose_embedding_is_narrower_is_refused(tmp_path: Path) -> None:
    config = family("opt").config()
    save_random(config, tmp_path)
    spec = tiny_spec(config, mask_token_id=5)
    with pytest.raises(ModelLoadError, match="hidden_size is 64, but the target's embedding table"):
        drafted(target(tmp_path), spec, tiny_tensors(spec))


@pytest.mark.parametrize(
    ("name", "table", "head"),
    [("gpt_neox", "gpt_neox.embed_in", "lm_head"), ("gemma2", "model.embed_tokens", "lm_head")],
)
def test_ends_are_found_by_structure(tmp_path: Path, name: str, table: str, head: str) -> None:
    stored = save_random(family(name).config(), tmp_path)
    host = draft_host(target(tmp_path), tmp_path)
    assert torch.equal(host.embedding.weight, stored.get_submodule(table).weight)  # type: ignore[arg-type]
    assert torch.equal(host.head.weight, stored.get_submodule(head).weight)  # type: ignore[arg-type]
