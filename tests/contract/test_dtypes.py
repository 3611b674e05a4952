"""The worker in 16 bits, which is how it runs on a GPU: the same path on a CPU, logits and draws still in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig, KVConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import DeviceOutOfMemory
from engine.models import selfcheck
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.registry import PIPELINES
from engine.runtime.batch import SeqInput
from engine.runtime.device_memory import largest_step
from engine.runtime.loading import LoadedModel, load_checked
from engine.types import FinishReason, StepOutput, StepPlan
from tests.contract.ladder import Ladder, load_worker, request
from tests.tiny import VOCAB, save_tiny

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("dtypes") / "qwen3")


def load(folder: Path, dtype: str) -> LoadedModel:
    return load_checked(ModelConfig(str(folder), device="cpu", dtype=dtype, attention="sdpa"), folder, lambda _: None)


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_and_pool_are_16_bits_and_logits_are_fp32(folder: Path, dtype: str) -> None:
    loaded = load(folder, dtype)
    runner = loaded.runner(8, 16)
    # Rotary tables are buffers, not parameters, and stay fp32.
    assert {parameter.dtype for parameter in loaded.adapter.model.parameters()} == {HALVES[dtype]}
    assert {layer.joint.dtype for layer in runner.cache.layers} == {HALVES[dtype]}
    assert loaded.numerics == f"cpu, {dtype}, none, sdpa"
    assert runner.forward([SeqInput([1, 2], 0, (0,), 2)], [1]).dtype is torch.float32


def test_the_largest_step_is_a_real_one(folder: Path) -> None:
    """Its peak is what the memory plan of a GPU is made from."""
    runner = load(folder, "bfloat16").runner(8, 16)
    tokens = largest_step(runner, tokens=100, rows=4, context_length=64)
    assert tokens.shape == (4,) and tokens.dtype == torch.int64 and int(tokens.max()) < VOCAB
    for layer in runner.cache.layers:
        assert bool(layer.joint[:100].any(1).all()) and not bool(layer.joint[100:].any())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_16_bit_worker_is_close_to_the_fp32_model_and_repeats_itself(folder: Path, dtype: str) -> None:
    ladder = Ladder(load_worker(folder, threads=1, dtype=dtype, attention="sdpa"), prefix_cache=False)
    prompt = list(range(40, 70))
    ways = [
        request("greedy", prompt, temperature=0.0, logprobs=1),
        request("drawn", prompt, temperature=0.9, top_p=0.8, seed=3, repetition_penalty=1.2, logprobs=3),
    ]
    first, again = ladder.run(ways), ladder.run(ways)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    allowed = selfcheck.tolerance("none", HALVES[dtype])
    for name, outcome in first.items():
        assert outcome.tokens == again[name].tokens and len(outcome.tokens) == 24
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + outcome.tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(outcome.tokens)[:, None])[:, 0]
        got = torch.tensor([entry.logprob for entry in outcome.logprobs])
        # A log-probability is a difference of two logits, each off by as much as the self-check allows.
        assert float((got - wanted).abs().max()) < 2 * allowed * float(logits.abs().max())
        assert float((got - wanted).abs().max()) > 1e-6, "this was computed in fp32"


class Greedy(AutoregressivePipeline):
    """Asks for more memory than there is whenever the request "big" runs."""

    def execute(self, plan: StepPlan) -> StepOutput:
        if any(item.request_id == "big" for item in plan.items):
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().execute(plan)


def test_a_step_out_of_memory_ends_its_requests_and_not_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIPELINES, "autoregressive", f"{__name__}:Greedy")
    worker = load_worker(folder, threads=1)
    core = EngineCore(worker, EngineConfig(kv=KVConfig(memory="64MiB")))
    core.add(request("big", [1, 2, 3], 4))
    core.add(request("beside", [1, 2, 3], 4))
    finishes = {update.request_id: update for update in core.step().updates}
    assert {update.finish for update in finishes.values()} == {FinishReason.ERROR}
    assert DeviceOutOfMemory.__name__ in (finishes["big"].error or "")
    core.add(request("after", [1, 2, 3], 4))
    tokens = [token for _ in range(8) if core.has_work() for u in core.step().updates for token in u.token_ids]
    core.settle()
    assert len(tokens) == 4 and worker.num_states() == 0
