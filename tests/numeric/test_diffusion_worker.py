"""A worker over a diffusion model: its pipeline, what it tells the scheduler, and a second model that drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import (
    DiffusionConfig,
    DraftConfig,
    EngineConfig,
    KVConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from engine.errors import InsufficientMemory, ModelLoadError
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.dual_diffusion import DualDiffusionPipeline
from engine.pipelines.masked_diffusion import MaskedDiffusionPipeline
from engine.registry import RULES
from engine.runtime.assembly import build_rules
from engine.runtime.device_memory import scored_rows, size_pool
from engine.runtime.loading import load_checked
from engine.runtime.worker import LocalWorker
from engine.types import Phase
from tests.tiny import save_tiny
from tests.tiny_diffusion import CONTEXT, MASK, VOCAB, save_tiny_diffusion


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_diffusion("a2d_llama_full", tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_diffusion("a2d_llama_block", tmp_path_factory.mktemp("blocks"))


def config(folder: Path, **model: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(str(folder), device="cpu", **{"quant": "none", **model}),
        scheduler=SchedulerConfig(max_num_seqs=4, max_batched_tokens=256),
        kv=KVConfig(memory="8MiB"),
        parallel=ParallelConfig(threads=1),
    )


def worker(folder: Path, phases: list[Phase] | None = None, **model: Any) -> LocalWorker:
    return LocalWorker(config(folder, **model), folder, (phases if phases is not None else []).append)


def test_a_diffusion_model_is_denoised_whatever_the_pipeline_was(full: Path, blocks: Path) -> None:
    for pipeline in ("autoregressive", "masked_diffusion"):
        canvas, grown = (worker(folder, pipeline=pipeline) for folder in (full, blocks))
        assert type(canvas._pipeline) is type(grown._pipeline) is MaskedDiffusionPipeline
        told = canvas.capacity()
        assert told.diffusion is not None and told.diffusion.mask_id == MASK and told.diffusion.attention == "full"
        assert told.max_canvas == 256 and told.max_model_len == CONTEXT and told.vocab_size == VOCAB
        assert told.traits.canvas and told.traits.unit == 1 and told.traits.denoises
        told = grown.capacity()
        assert told.diffusion is not None and told.diffusion.block_causal
        assert told.max_canvas == 0 and told.traits.unit == 8 and not told.traits.canvas
        assert not (told.step_costs or told.draft_costs or told.verifiers)


def test_rules_are_all_told_of(full: Path) -> None:
    assert tuple(build_rules()) == tuple(RULES)
    assert tuple(card.name for card in worker(full).capacity().rules) == tuple(RULES)


def test_pipelines_that_do_not_fit(full: Path, tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path)
    assert type(worker(plain)._pipeline) is AutoregressivePipeline
    assert worker(plain).capacity().diffusion is None and worker(plain).capacity().rules == ()
    for pipeline in ("masked_diffusion", "dual_diffusion"):
        with pytest.raises(ModelLoadError, match=rf"models\.pipeline: {pipeline} serves masked-diffusion models"):
            worker(plain, pipeline=pipeline)
    with pytest.raises(ModelLoadError, match="which drafts can't speed up"):
        worker(full, pipeline="speculative", draft=DraftConfig("ngram"))


def test_a_plain_decoder_is_denoised_if_the_configuration_says_so(tmp_path: Path) -> None:
    plain = save_tiny("qwen3", tmp_path)
    told = worker(plain, diffusion=DiffusionConfig(attention="block_causal", mask_id=9, block_length=4)).capacity()
    assert told.diffusion is not None and (told.diffusion.mask_id, told.traits.unit) == (9, 4)


def test_blocks_fit_into_the_context(blocks: Path) -> None:
    assert worker(blocks, max_model_len=100).capacity().max_model_len == 96
    assert worker(blocks).capacity().max_model_len == CONTEXT
    with pytest.raises(InsufficientMemory, match=r"models\.max_model_len: 7 tokens are less than one block of 8"):
        worker(blocks, max_model_len=7)


def test_what_a_step_keeps_room_for(full: Path, blocks: Path) -> None:
    """Rows of logits: up to a block of every sequence, and never more than a step feeds."""
    for folder, wished, rows in ((blocks, None, 32), (full, None, 32), (full, 32, 128), (full, 100, 256)):
        settings = config(folder, diffusion=DiffusionConfig(block_length=wished))
        loaded = load_checked(settings.model, folder, lambda _: None)
        assert scored_rows(settings, loaded) == rows
        plain = replace(loaded, diffusion=None)
        assert scored_rows(settings, plain) == 4
        sizes = [kept(size_pool(settings, model, 1 << 12)[2]) for model in (loaded, plain)]
        assert sizes[0] - sizes[1] == pytest.approx(16 * (rows - 4) * VOCAB / 2**20, abs=1.01)


def kept(text: str) -> int:
    return int(text.split(" MiB")[0].replace(",", ""))


# ---- two models ------------------------------------------------------------------------------------------


def dual(folder: Path, drafter: Path | str, **diffusion: Any) -> tuple[LocalWorker, list[Phase]]:
    phases: list[Phase] = []
    settings = DiffusionConfig(drafter=str(drafter), **diffusion)
    return worker(folder, phases, pipeline="dual_diffusion", diffusion=settings), phases


def test_a_model_that_drafts_for_itself(full: Path) -> None:
    alone, _ = dual(full, "")
    assert type(alone._pipeline) is DualDiffusionPipeline
    assert alone.memory.draft_weights == alone.memory.draft_pool == 0
    assert alone.capacity().max_canvas == 256


@pytest.mark.parametrize("quant", ["none", "fp16"])
def test_two_models_share_block_ids_and_memory(full: Path, blocks: Path, quant: str) -> None:
    phases: list[Phase] = []
    settings = DiffusionConfig(drafter=str(blocks))
    both = worker(full, phases, pipeline="dual_diffusion", diffusion=settings, quant=quant)
    assert "drafter: self-check" in [phase.name for phase in phases]
    told, memory = both.capacity(), both.memory
    assert told.diffusion is not None and told.diffusion.attention == "full"
    assert told.traits.canvas and told.traits.unit == 8 and told.max_canvas == 256
    assert memory.draft_pool == memory.target_pool > 0 and memory.draft_weights == memory.target_weights
    assert memory.draft_pool + memory.target_pool <= 8 << 20
    runners = both._pipeline._runner, both._pipeline._drafter  # type: ignore[attr-defined]
    assert [runner.cache.num_blocks for runner in runners] == [told.num_blocks] * 2
    assert runners[0].cache is not runners[1].cache


def test_a_full_pool_is_shared_between_the_two(full: Path, blocks: Path) -> None:
    """A pool too small for all sequences has room for half the blocks where every block is held twice."""
    small = KVConfig(memory="256KiB")
    halves = []
    for settings in (
        config(full),
        config(full, pipeline="dual_diffusion", diffusion=DiffusionConfig(drafter=str(blocks))),
    ):
        halves.append(LocalWorker(replace(settings, kv=small), full, lambda _: None).capacity())
    assert halves[0].num_blocks == 2 * halves[1].num_blocks
    assert halves[1].max_model_len == min(CONTEXT, 16 * halves[1].num_blocks)


def test_a_drafter_of_another_context(full: Path, tmp_path: Path) -> None:
    short = save_tiny_diffusion("a2d_llama_block", tmp_path, max_position_embeddings=100)
    assert dual(full, short)[0].capacity().max_model_len == 96


def test_a_drafter_with_a_smaller_embedding(full: Path, tmp_path: Path) -> None:
    """Padding of the served one's: ids that the drafter has no row for can't be asked for."""
    padded = save_tiny_diffusion("llada", tmp_path / "padded")
    drafter = save_tiny_diffusion("llada", tmp_path / "drafter", embedding_size=VOCAB + 3)
    widen(drafter)
    assert dual(padded, drafter)[0].capacity().vocab_size == VOCAB
    assert dual(drafter, padded)[0].capacity().vocab_size == VOCAB


def widen(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        tensors[name] = torch.cat((tensors[name], tensors[name][:3]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_drafters_that_can_not_help(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"diffusion\.drafter: plain is no masked-diffusion model"):
        dual(full, save_tiny("llama", tmp_path / "plain"))
    with pytest.raises(
        ModelLoadError, match=r"another tokenizer.*'<\|im_end\|>' is 259 here and unknown there.*exactly"
    ):
        dual(full, save_tiny_diffusion("llada", tmp_path / "other"))
    with pytest.raises(ModelLoadError, match=r"another mask token"):
        dual(full, save_tiny_diffusion("a2d_llama_block", tmp_path / "mask", mask_token_id=258))
    more = save_tiny_diffusion("a2d_llama_block", tmp_path / "more")
    tokens = json.loads((more / "tokenizer.json").read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 261, "content": "<|more|>"})
    (more / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelLoadError, match=r"'<\|more\|>' is unknown here"):
        dual(full, more)
    (more / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json can't be read"):
        dual(full, more)
    with pytest.raises(ModelLoadError):
        dual(full, tmp_path / "nowhere")
