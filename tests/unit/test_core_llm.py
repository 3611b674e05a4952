"""The offline LLM: the same engine in this process, here with a fake worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError, ContextLengthExceeded, InvalidRequest, StepFailed
from engine.llm import LLM, configure
from engine.types import FinishReason, SamplingParams, SpeculationParams, SpeculationReport, Usage
from tests.unit.fake_worker import FAIL_REQUEST, answer, write_checkpoint

WORKER = "tests.unit.fake_worker:FakeWorker"


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with LLM(str(write_checkpoint(tmp_path, lookahead=3)), worker=WORKER, max_batched_tokens=16, lag=1) as llm:
        yield llm


def test_texts_ids_and_chats(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, logprobs=0, prompt_logprobs=0)
    (one,) = llm.generate("hello", params)
    assert (one.text, one.finish, one.usage) == (answer(5, 6), FinishReason.LENGTH, Usage(5, 6))
    assert one.prompt_ids == tuple(b"hello") and one.token_ids == tuple(answer(5, 6).encode())
    assert len(one.logprobs or ()) == 6 and len(one.prompt_logprobs or ()) == 5
    several = llm.generate(["a" * n for n in range(1, 40, 3)], SamplingParams(max_tokens=9))
    assert [c.text for c in several] == [answer(n, 9) for n in range(1, 40, 3)]
    assert [c.text for c in llm.generate([[65, 66], [65]], [SamplingParams(2), SamplingParams(3)])] == [
        answer(2, 2),
        answer(1, 3),
    ]
    assert llm.generate([]) == []
    prompt = "user: hi\n"
    assert llm.chat([{"role": "user", "content": "hi"}], SamplingParams(3)).text == answer(len(prompt), 3)


def test_a_stop_string_leaves_nothing_behind(llm: LLM) -> None:
    (stopped,) = llm.generate(["x" * 26], SamplingParams(max_tokens=400, stop=("bc",)))
    assert (stopped.text, stopped.stop_reason, stopped.usage.completion_tokens) == ("a", "bc", 3)
    assert llm._core.stats().running == 0 and llm._core.num_states() == 0


def test_a_verifier_is_checked_settled_and_reported(tmp_path: Path) -> None:
    verifier = {"knobs": {"target_weight": 0.9}, "name": "ensemble", "max_bias": 0.5}
    settings: dict[str, Any] = {"pipeline": "speculative", "draft": {"drafter": "ngram"}, "verifier": verifier}
    with LLM(str(write_checkpoint(tmp_path, lookahead=3, drafts=1)), worker=WORKER, **settings) as llm:
        (mine,) = llm.generate("hello", SamplingParams(9), SpeculationParams(knobs=(("target_weight", 0.5),)))
        (greedy,) = llm.generate("hello", SamplingParams(9, temperature=0))
        (strict,) = llm.generate("hello", SamplingParams(9), SpeculationParams(verifier="strict"))
        for refused in (SpeculationParams(verifier="typical"), SpeculationParams(knobs=(("target_weight", 0.1),))):
            with pytest.raises(InvalidRequest, match=r"by 0\.5 at most"):
                llm.generate("hello", SamplingParams(9), refused)
    assert mine.text == greedy.text == strict.text == answer(5, 9) and strict.speculation is None
    rounds = SpeculationReport(2, 6, 6, (0, 0, 0, 2), 9, bias=6 / 4, verifier="ensemble")  # behind the prompt's token
    assert mine.speculation == replace(rounds, knobs=(("target_weight", 0.5),), decoder="relaxed", bias_bound=0.5)
    assert greedy.speculation is not None and greedy.speculation.decoder == "relaxed_greedy"
    assert (greedy.speculation.bias_bound, greedy.speculation.knobs) == (None, (("target_weight", 0.9),))


def test_bad_requests_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate(["fine", "x" * 512])
    with pytest.raises(InvalidRequest):
        llm.generate([[]])
    with pytest.raises(ValueError, match="2 prompts"):
        llm.generate(["a", "b"], [SamplingParams(1)])
    assert not llm._core.has_work()


def test_a_failed_request_does_not_spoil_the_next_call(llm: LLM) -> None:
    with pytest.raises(StepFailed, match="scripted"):
        llm.generate([[65] * 26, [FAIL_REQUEST, 65]], SamplingParams(50))
    assert llm.generate(["x" * 26], SamplingParams(3))[0].text == "abc"
    assert llm._core.num_states() == 0


def test_settings_of_every_section_are_taken(tmp_path: Path) -> None:
    config = configure({"path": "demo", "quant": "none", "max_num_seqs": 8, "memory": "1MiB", "threads": 2})
    assert (config.model.quant, config.scheduler.max_num_seqs) == ("none", 8)
    assert (config.kv.memory, config.parallel.threads) == ("1MiB", 2)
    with pytest.raises(ConfigError, match="colour: unknown setting"):
        configure({"colour": "red"})
    with pytest.raises(ConfigError, match="not both"):
        LLM(config=EngineConfig(), quant="none")
    folder = write_checkpoint(tmp_path)
    with LLM(config=EngineConfig(ModelConfig(str(folder), "name")), worker=WORKER) as llm:
        assert llm.info.id == "name"
