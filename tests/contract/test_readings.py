"""Requests that read: pooled states and laws are those of the model itself, whatever happens around the request."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.config import DraftConfig, EngineConfig
from engine.core import model_info
from engine.errors import InvalidRequest
from engine.protocols import Worker
from engine.reading import Law, Probe, Reading, Readout
from engine.types import FinishReason, Request, SamplingParams, SeqUpdate
from engine.validate import validate
from tests.contract.ladder import Ladder, assert_same, load_worker, request
from tests.tiny import save_tiny

NOTHING = SamplingParams(max_tokens=0, temperature=0.0)
RUNGS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"chunk": 16},
    "chunked, lag 1": {"chunk": 13, "lag": 1},
    "scarce": {"num_blocks": 8, "chunk": 16},
    "no prefix cache": {"prefix_cache": False, "seqs": 2},
}
DRAFTS = {"plain": None, "ngram": DraftConfig("ngram", max_draft=4)}


@dataclass(frozen=True, slots=True)
class Served:
    folder: Path
    worker: Worker


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "gpt2-ngram"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    family, _, drafter = request.param.partition("-")
    folder = save_tiny(family, tmp_path_factory.mktemp("model"))
    return Served(folder, load_worker(folder, memory="8MiB", threads=1, draft=DRAFTS[drafter or "plain"]))


def reads(name: str, prompt: Sequence[int], reading: Reading, **more: Any) -> Request:
    return Request(name, tuple(prompt), NOTHING, reading=reading, **more)


def workload() -> list[Request]:
    """Prompts of 1 to 70 tokens, some with a common beginning; every kind of reading, and some of both."""
    rng = random.Random(2)
    shared = [rng.randrange(256) for _ in range(48)]
    prompts = [[rng.randrange(256) for _ in range(size)] for size in (1, 9, 16, 33)]
    prompts += [shared, [*shared, 4, 5], [*shared, *prompts[3][:22]]]
    found = []
    for i, prompt in enumerate(prompts):
        probes = (Probe(len(prompt), (3, 200, 7)), Probe(1 + i % len(prompt), (9,)))
        found += [
            reads(f"mean{i}", prompt, Reading("mean")),
            reads(f"last{i}", prompt, Reading("last", normalize=False)),
            reads(f"laws{i}", prompt, Reading(probes=probes)),
            reads(f"both{i}", prompt, Reading("mean", normalize=False, probes=probes[::-1])),
        ]
    return found


@torch.inference_mode()
def expected(folder: Path, requests: Sequence[Request]) -> dict[str, Readout]:
    """By transformers: each prompt alone, whole, in one pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for one in requests:
        ids, reading = torch.tensor([one.prompt_ids]), one.reading
        assert reading is not None
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].double()
        laws = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(1)
        vector = torch.empty(0)
        if reading.pooling:
            vector = states.mean(0) if reading.pooling == "mean" else states[-1]
            vector = vector / vector.norm() if reading.normalize else vector
        rows = [laws[probe.position - 1] for probe in reading.probes]
        read = tuple(
            Law(tuple(row[list(probe.token_ids)].tolist()), int(row.argmax()))
            for row, probe in zip(rows, reading.probes, strict=True)
        )
        found[one.id] = Readout(vector.float().numpy().astype("<f4").tobytes(), read)
    return found


def vector_of(readout: Readout) -> np.ndarray:
    return np.array(struct.unpack(f"<{len(readout.vector) // 4}f", readout.vector))


def assert_close(want: Readout, got: Readout | None, name: str) -> None:
    assert got is not None, name
    np.testing.assert_allclose(vector_of(got), vector_of(want), rtol=2e-4, atol=2e-5, err_msg=name)
    assert [law.best for law in got.laws] == [law.best for law in want.laws], name
    for a, b in zip(got.laws, want.laws, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("rung", RUNGS)
def test_readings_are_those_of_transformers(served: Served, rung: str, one_thread: None) -> None:
    requests = workload()
    ladder = Ladder(served.worker, **RUNGS[rung])
    outcomes = ladder.run(requests)
    for name, want in expected(served.folder, requests).items():
        got = outcomes[name]
        assert got.finish is FinishReason.STOP and not got.tokens and not got.logprobs
        assert_close(want, got.reading, name)


def test_one_that_is_pushed_out_reads_its_prompt_again(served: Served, one_thread: None) -> None:
    core = Ladder(served.worker, num_blocks=8, chunk=16).core
    slow = [
        reads("mean", range(100), Reading("mean"), priority=1),
        reads("last", range(99), Reading("last"), priority=1),
    ]
    urgent = request("urgent", range(90, 150), 3, temperature=0.0)
    core.add(slow[0])
    core.add(slow[1])
    found: dict[str, SeqUpdate] = {}
    for step in range(200):
        if step == 3:
            core.add(urgent)
        found.update({update.request_id: update for update in core.step().updates if update.finish})
        core.check_integrity()
    core.settle()
    assert not core.has_work() and found["mean"].preemptions == 1 and found["urgent"].finish
    for name, want in expected(served.folder, slow).items():
        assert_close(want, found[name].reading, name)


def test_what_is_found_in_the_cache_is_only_what_no_reading_needs(served: Served, one_thread: None) -> None:
    ladder = Ladder(served.worker)
    prompt = list(range(40, 100))
    first = ladder.run([reads("mean", prompt, Reading("mean"))])["mean"]
    again = ladder.run([reads("mean", prompt, Reading("mean"))])["mean"]
    last = ladder.run([reads("last", prompt, Reading("last"))])["last"]
    probed = ladder.run([reads("laws", prompt, Reading(probes=(Probe(20, (1,)), Probe(60, (1,)))))])["laws"]
    assert (again.cached_tokens, last.cached_tokens, probed.cached_tokens) == (0, 48, 16)
    assert again.reading == first.reading
    # A generation finds what a reading has left.
    answer = ladder.run([request("text", prompt, 4, temperature=0.0)])["text"]
    assert answer.cached_tokens == 48


def test_writers_are_not_disturbed_by_readers(served: Served, one_thread: None) -> None:
    writers = [request(f"w{i}", range(i, i + 30), 12, temperature=0.0, logprobs=2) for i in range(4)]
    alone = Ladder(served.worker).run(writers)
    ladder = Ladder(served.worker, chunk=24)
    readers = workload()
    mixed = [one for pair in zip(readers, writers * 7, strict=True) for one in pair]
    together = ladder.run([*dict.fromkeys(mixed)])
    assert_same(alone, {one.id: together[one.id] for one in writers})
    for name, want in expected(served.folder, readers[:4]).items():
        assert_close(want, together[name].reading, name)


def test_a_reader_that_goes_leaves_nothing(served: Served, one_thread: None) -> None:
    ladder = Ladder(served.worker, chunk=16, lag=1)
    requests = [reads(f"r{i}", range(100), Reading("mean")) for i in range(3)]
    outcomes = ladder.run(requests, lambda step: ladder.core.abort(["r1"]) if step == 2 else None)
    assert outcomes["r1"].finish is FinishReason.ABORT and outcomes["r1"].reading is None
    assert outcomes["r0"].reading == outcomes["r2"].reading != None  # noqa: E711


def test_a_native_program_reads_the_same(tmp_path: Path, one_thread: None) -> None:
    """A packed model as one C call: laws go through it whole, pooled states up to its last hidden states."""
    folder = save_tiny("qwen3", tmp_path / "model")
    worker = load_worker(folder, quant="fp16", memory="8MiB", threads=1)
    requests = workload()
    outcomes = Ladder(worker, chunk=24).run(requests)
    for name, want in expected(folder, requests).items():
        got = outcomes[name].reading
        assert got is not None
        np.testing.assert_allclose(vector_of(got), vector_of(want), atol=0.03, rtol=0.03)
        for a, b in zip(got.laws, want.laws, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05)
    whole = Ladder(worker).run(requests)
    for one in requests:
        assert_close(whole[one.id].reading or Readout(), outcomes[one.id].reading, one.id)


WRONG: dict[str, tuple[Reading, str]] = {
    "nothing": (Reading(), "reading"),
    "pooling": (Reading("max"), "pooling"),
    "before the first": (Reading(probes=(Probe(0, (1,)),)), "reading"),
    "behind the last": (Reading(probes=(Probe(5, (1,)),)), "reading"),
    "no ids": (Reading(probes=(Probe(1, ()),)), "reading"),
    "foreign ids": (Reading(probes=(Probe(1, (99_999,)),)), "reading"),
    "too many": (Reading(probes=(Probe(1, (1,)),) * 513), "reading"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_reading_is_refused(served: Served, what: str) -> None:
    info = model_info(EngineConfig(), served.worker.capacity(), (257,), 0)
    reading, param = WRONG[what]
    with pytest.raises(InvalidRequest) as error:
        validate(reads("r", (1, 2, 3, 4), reading), info)
    assert error.value.param == param
    fitting = validate(reads("r", (1,) * info.max_model_len, Reading("last")), info)
    assert fitting.sampling.max_tokens == 0
    with pytest.raises(InvalidRequest):
        validate(replace(fitting, prompt_ids=(1,) * (info.max_model_len + 1)), info)
