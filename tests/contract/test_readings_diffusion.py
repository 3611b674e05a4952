"""Readings of models that denoise: the prompt with its masks is the canvas, its laws are those of a plain forward."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engine.config import DiffusionConfig, EngineConfig, KVConfig, ModelConfig, ParallelConfig
from engine.core import model_info
from engine.diffusion import DiffusionParams, DiffusionSpec
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.protocols import Worker
from engine.reading import Probe, Reading, Readout
from engine.runtime.worker import LocalWorker
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import ModelInfo, Request, SamplingParams, Usage
from engine.validate import validate
from server.contract import Engine
from server.decisions.asking import Case, ask
from server.decisions.questions import choice, score, yes_or_no
from server.reads import Read
from server.service import Service
from server.settings import Settings
from tests.contract.ladder import Ladder, load_worker
from tests.contract.test_readings import reads, vector_of
from tests.numeric.diffusion_reference import reference_logits, reference_states
from tests.tiny_diffusion import MASK, save_tiny_diffusion

KINDS = ("llada", "dream", "fast_dllm_v2", "sdar", "dual")


@dataclass(frozen=True, slots=True)
class Served:
    folder: Path
    worker: Worker

    @property
    def drafted(self) -> bool:
        return not self.worker.capacity().traits.chunkable and self.worker.capacity().traits.unit > 1

    @property
    def spec(self) -> DiffusionSpec:
        spec = self.worker.capacity().diffusion
        assert spec is not None
        return spec


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    kind = request.param if request.param != "dual" else "a2d_llama_full"
    folder = save_tiny_diffusion(kind, tmp_path_factory.mktemp("model"))
    if request.param != "dual":
        return Served(folder, load_worker(folder, memory="8MiB", threads=1))
    drafter = save_tiny_diffusion("a2d_llama_block", tmp_path_factory.mktemp("drafter"))
    model = ModelConfig(
        str(folder),
        pipeline="dual_diffusion",
        quant="none",
        device="cpu",
        diffusion=DiffusionConfig(drafter=str(drafter)),
    )
    config = EngineConfig(model=model, kv=KVConfig(memory="8MiB"), parallel=ParallelConfig(threads=1))
    return Served(folder, LocalWorker(config, folder, lambda _: None))


def canvases(served: Served) -> list[Request]:
    """Questions on one canvas, with a mask for each answer, and each of them by itself; pooled texts beside them."""
    rng = random.Random(5)
    state = [rng.randrange(256) for _ in range(41)]
    questions = [[rng.randrange(256) for _ in range(size)] for size in (3, 9, 1, 22)]
    joint, probes, found = list(state), [], []
    for i, question in enumerate(questions):
        joint += question
        probes.append(Probe(len(joint), (i, 65 + i, 200)))
        joint.append(MASK)
        alone = [*state, *question, MASK]
        found.append(reads(f"alone{i}", alone, Reading(probes=(Probe(len(alone) - 1, (65, 66)),))))
    found.append(reads("joint", [*joint, 10, 11], Reading(probes=tuple(probes))))
    found += [reads(f"mean{size}", state[:size], Reading("mean", normalize=False)) for size in (1, 40)]
    return [*found, reads("last", state[:33], Reading("last"))]


def check(served: Served, one: Request, got: Readout | None) -> None:
    spec, reading = served.spec, one.reading
    assert reading is not None and got is not None
    mode, block = ("block_causal", spec.block_length) if spec.block_causal else ("full", 1)
    if reading.pooling:
        states = reference_states(served.folder, one.prompt_ids, mode, block)
        want = states.mean(0) if reading.pooling == "mean" else states[-1]
        want = want / np.linalg.norm(want) if reading.normalize else want
        np.testing.assert_allclose(vector_of(got), want, rtol=1e-3, atol=1e-4, err_msg=one.id)
    logits = reference_logits(served.folder, one.prompt_ids, mode, block)
    logits[:, spec.mask_id] = -np.inf
    for law, probe in zip(got.laws, reading.probes, strict=True):
        row = logits[probe.position - spec.shift]
        row = row - row.max() - np.log(np.exp(row - row.max()).sum())
        np.testing.assert_allclose(law.logprobs, row[list(probe.token_ids)], atol=1e-3, err_msg=one.id)
        assert law.best == row.argmax()


@pytest.mark.parametrize("chunk", (512, 64))
def test_laws_at_the_masks_are_those_of_a_plain_forward(served: Served, chunk: int, one_thread: None) -> None:
    requests = canvases(served)
    if chunk < 512 and not served.spec.block_causal:
        requests = [one for one in requests if len(one.prompt_ids) <= chunk]
    outcomes = Ladder(served.worker, chunk=chunk).run(requests)
    for one in requests:
        outcome = outcomes[one.id]
        assert outcome.finish == "stop" and not outcome.tokens
        check(served, one, outcome.reading)


def test_one_step_answers_all_questions_of_a_canvas(served: Served, one_thread: None) -> None:
    """Jointly: one denoise step. That answers read together are not those read alone is the canvas's doing."""
    requests = {one.id: one for one in canvases(served)}
    ladder = Ladder(served.worker)
    steps: list[int] = []
    joint = ladder.run([requests["joint"]], steps.append)["joint"].reading
    assert joint is not None and len(joint.laws) == 4 and len(steps) <= 2  # the second only drops its state
    alone = Ladder(served.worker).run([requests["alone3"]])["alone3"].reading
    assert alone is not None and alone.laws[0].logprobs != joint.laws[3].logprobs


def test_a_prompt_may_fill_the_pool(served: Served, one_thread: None) -> None:
    """Nothing is to be written behind it, so no block is held for that."""
    whole = reads("whole", [i % 256 for i in range(64)], Reading("mean"))
    check(served, whole, Ladder(served.worker, num_blocks=4).run([whole])["whole"].reading)


@dataclass(frozen=True, slots=True)
class Front:
    """As much of an engine as questions need."""

    info: ModelInfo
    tokenizer: Tokenizer


@pytest.mark.asyncio
@pytest.mark.parametrize("joint", [True, False])
async def test_decisions_are_the_law_at_the_masks_of_their_canvases(served: Served, joint: bool) -> None:
    """From a question to its probabilities, against a plain forward of the canvas that it was put on."""
    spec, pipeline = served.spec, "dual_diffusion" if served.drafted else "masked_diffusion"
    config = EngineConfig(model=ModelConfig(pipeline=pipeline, diffusion=DiffusionConfig(canvas=16)))
    info = model_info(config, served.worker.capacity(), (257,), 0)
    front = Front(info, Tokenizer.load(served.folder, spec.mask_id))
    asked = [
        yes_or_no("q", "hot?"),
        choice("q", "who?", [("a", ""), ("b", ""), ("c", "")]),
        score("q", "", [("x", "")] * 4),
    ]
    case = Case("It burns.", asked, "input", joint=joint)
    found = await ask(case, cast(Engine, front), cast(Service, _Settings()))
    requests = [validate(one, info) for one in found.requests]
    assert len(requests) == (1 if joint else 3)
    outcomes = Ladder(served.worker).run(requests)
    reads = [Read(outcomes[one.id].reading or Readout(), Usage(0, 0)) for one in requests]
    weighed = found.weighed(reads)
    mode, block = ("block_causal", spec.block_length) if spec.block_causal else ("full", 1)
    probes = [(one, probe) for one in requests for probe in (one.reading or Reading()).probes]
    for (one, probe), groups, own, question in zip(probes, found.groups, weighed, asked, strict=True):
        assert one.prompt_ids[probe.position] == spec.mask_id and len(groups) == len(question.options)
        logits = reference_logits(served.folder, one.prompt_ids, mode, block)
        logits[:, spec.mask_id] = -np.inf
        law = np.exp(logits[probe.position - spec.shift] - logits[probe.position - spec.shift].max())
        shares = np.array([law[list(group)].sum() for group in groups])
        np.testing.assert_allclose(own.probabilities, shares / shares.sum(), atol=1e-3)
        assert own.mass == pytest.approx(shares.sum() / law.sum(), abs=1e-3)


class _Settings:
    """What asking reads of a service."""

    def __init__(self) -> None:
        self.settings = Settings()


def test_readers_and_writers_share_steps(served: Served, one_thread: None) -> None:
    spec = served.spec
    length = spec.block_length if spec.block_causal else 8
    wish = DiffusionParams("threshold", (("threshold", 0.5),), spec.caches[0], length, 16, verify="trust")
    if served.drafted:
        wish = replace(wish, cache="dual", block_length=8, drafter_steps=2)
    prompts = [tuple(range(i, i + 20)) for i in range(2)]
    writers = [
        Request(f"w{i}", ids, SamplingParams(16, temperature=0.0), diffusion=wish) for i, ids in enumerate(prompts)
    ]
    alone = Ladder(served.worker).run(writers)
    readers = canvases(served)
    together = Ladder(served.worker, chunk=192).run([*readers[:4], *writers, *readers[4:]])
    for one in writers:
        assert together[one.id].tokens == alone[one.id].tokens
    for one in readers:
        check(served, one, together[one.id].reading)


def test_what_can_not_be_read_is_refused(served: Served) -> None:
    model = ModelConfig(diffusion=DiffusionConfig(canvas=16))
    pipeline = "dual_diffusion" if served.drafted else "masked_diffusion"
    info = model_info(EngineConfig(model=replace(model, pipeline=pipeline)), served.worker.capacity(), (257,), 0)
    fine = reads("r", (1, 2, MASK, 4), Reading(probes=(Probe(2, (5,)),)))
    assert validate(fine, info).diffusion == DiffusionParams()
    wrong: dict[str, Any] = {
        "no mask there": replace(fine, reading=Reading(probes=(Probe(1, (5,)),))),
        "masks are no text": replace(fine, reading=Reading("mean")),
    }
    for what, one in wrong.items():
        with pytest.raises(InvalidRequest):
            validate(one, info)
            pytest.fail(what)
    with pytest.raises(ContextLengthExceeded):
        validate(replace(fine, prompt_ids=(1,) * 600, reading=Reading("mean")), info)
