"""The engine on a CUDA device beside itself on the CPU: `make test-gpu`."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, KVConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import DeviceOutOfMemory
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.registry import ATTENTION, PIPELINES
from engine.runtime.batch import SeqInput
from engine.runtime.device_memory import step_peak
from engine.runtime.loading import LoadedModel, load_checked
from engine.runtime.rng import Draw, bits_at, bits_numpy, bits_torch, gumbel_rows
from engine.runtime.sampler import Sampler, SamplingState
from engine.runtime.transfer import to_device
from engine.runtime.worker import LocalWorker
from engine.types import FinishReason, Phase, Request, SamplingParams, StepOutput, StepPlan
from tests.contract.ladder import Ladder, assert_same, load_worker, request
from tests.tiny import FAMILIES, VOCAB, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this build of torch finds no CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BACKENDS = [name for name in ("triton_paged", "sdpa") if name in ATTENTION]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("gpu") / "qwen3")


def requests() -> list[Request]:
    """Prompts of different lengths, greedy and drawn in different ways; greedy ones tell how close a tie was."""
    prompts = [[(7 * i + j * j) % 256 for j in range(length)] for i, length in enumerate((3, 17, 40, 70, 129))]
    ways = [request(f"greedy-{i}", prompt, temperature=0.0, logprobs=2) for i, prompt in enumerate(prompts)]
    return [
        *ways,
        request("drawn-0", prompts[0], temperature=0.8, seed=5),
        request("drawn-1", prompts[1], temperature=1.0, top_p=0.9, top_k=40, seed=6),
        request("drawn-2", prompts[2], temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=7),
    ]


# ---- tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_tokens_are_those_of_the_cpu(family: str, attention: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / family)
    greedy = [each for each in requests() if each.id.startswith("greedy")]
    expected = Ladder(load_worker(folder, threads=1, attention="sdpa")).run(greedy)
    worker = load_worker(folder, device="cuda", dtype="float32", attention=attention)
    assert assert_same(expected, Ladder(worker).run(greedy)) <= 1, "near-ties"


@pytest.mark.parametrize("attention", BACKENDS)
def test_the_ladder_holds_on_the_device(folder: Path, attention: str) -> None:
    """fp32: in chunks, alone, preempted and a step late, greedy and drawn, the tokens are those of one big batch."""
    worker = load_worker(folder, device="cuda", dtype="float32", attention=attention)
    expected = Ladder(worker).run(requests())
    assert_same(expected, Ladder(worker, chunk=7).run(requests()))
    assert_same(expected, Ladder(worker, seqs=1).run(requests()))
    assert_same(expected, Ladder(worker, lag=1).run(requests()))
    squeezed = Ladder(worker, num_blocks=12)
    assert_same(expected, squeezed.run(requests()))
    assert squeezed.stats.preemptions > 0


def test_a_batch_gives_the_same_tokens_again_in_bf16(folder: Path) -> None:
    worker = load_worker(folder, device="cuda", dtype="bfloat16")
    first, again = (Ladder(worker, prefix_cache=False).run(requests()) for _ in range(2))
    assert {name: outcome.tokens for name, outcome in first.items()} == {
        name: outcome.tokens for name, outcome in again.items()
    }


# ---- attention -------------------------------------------------------------------------------------------


def load(folder: Path, attention: str, dtype: str, device: str = "cuda") -> LoadedModel:
    config = ModelConfig(str(folder), device=device, dtype=dtype, attention=attention, quant="none")
    return load_checked(config, folder, lambda _: None)


@pytest.mark.skipif("triton_paged" not in ATTENTION, reason="no Triton backend in the registry")
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-4), ("bfloat16", 4e-2), ("float16", 1e-2)])
@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3"])
def test_triton_gives_the_logits_of_sdpa(family: str, dtype: str, allowed: float, tmp_path: Path) -> None:
    """A prefill, then decodes and a verify block over it; relative to the largest logit of the fp32 CPU run."""
    folder = save_tiny(family, tmp_path / family)
    prompt = [(3 * j) % 256 for j in range(150)]
    logits = []
    for device, attention, kind in (
        ("cpu", "sdpa", "float32"),
        ("cuda", "sdpa", dtype),
        ("cuda", "triton_paged", dtype),
    ):
        runner = load(folder, attention, kind, device).runner(32, 16)
        tables = tuple(range(15, -1, -1)), tuple(range(16, 32))
        steps: list[list[SeqInput]] = [
            [SeqInput(prompt[:100], 0, tables[0], 100), SeqInput(prompt, 0, tables[1], 150)],
            [SeqInput(prompt[100:101], 100, tables[0], 101), SeqInput(prompt[:8], 150, tables[1], 158)],
        ]
        rows = [runner.forward(step, range(sum(len(item.ids) for item in step))).cpu() for step in steps]
        logits.append(torch.cat(rows))
    reference, sdpa, triton = logits
    scale = float(reference.abs().max())
    assert float((sdpa - reference).abs().max()) < allowed * scale
    assert float((triton - reference).abs().max()) < allowed * scale


# ---- sampling --------------------------------------------------------------------------------------------


def test_random_bits_are_those_of_the_cpu() -> None:
    draws = [Draw(1, 0, 5), Draw(-(2**63), 3, 2**40, 4, 7), Draw(2**63 - 1, 1, 0)]
    bits = torch.from_numpy(bits_numpy(draws, 151_936).astype("int64"))
    assert torch.equal(bits_torch(draws, 151_936, CUDA).cpu(), bits)
    rows, lanes = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 151_935, 77, 8])
    assert torch.equal(bits_at(draws, rows.to(CUDA), lanes.to(CUDA)).cpu(), bits[rows, lanes])
    noise = gumbel_rows(draws, 4096, CUDA).cpu()
    torch.testing.assert_close(noise, gumbel_rows(draws, 4096, CPU), rtol=2e-6, atol=2e-6)


WAYS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "bad_words": ((4,), (1, 2))},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.6, "top_k": 20, "seed": 2},
    {"temperature": 1.3, "top_p": 0.95, "seed": 3},
    {"temperature": 0.9, "min_p": 0.1, "logit_bias": ((5, 4.0), (9, -100.0)), "seed": 4},
    {"temperature": 1.0, "allowed_token_ids": (3, 8, 90), "seed": 5},
    {"temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.5, "top_k": 3000, "top_p": 0.7, "seed": 6},
)


def states(count: int) -> list[SamplingState]:
    found = []
    for row in range(count):
        sampling = SamplingParams(max_tokens=9, **WAYS[row % len(WAYS)])  # type: ignore[arg-type]
        found.append(SamplingState(Request(str(row), (1, 2, 3), sampling), output_ids=(7, 1, 2)[: row % 4]))
    return found


def test_drawn_tokens_and_logprobs_are_those_of_the_cpu() -> None:
    logits = torch.randn(64, 32_000, generator=torch.Generator().manual_seed(0)) * 3
    logits[11] = float("nan")
    wanted: Sequence[int | None] = [None if row % 3 else row % 5 for row in range(64)]
    want = Sampler(32_000).sample(logits, states(64), wanted)
    have = Sampler(32_000).sample(logits.to(CUDA), states(64), wanted)
    assert have.tokens.device == CUDA and have.tokens.tolist() == want.tokens.tolist()
    assert have.failed.tolist() == want.failed.tolist() and have.failed.sum() == 1
    for mine, theirs in zip(have.logprobs, want.logprobs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert (mine.token_id, mine.rank) == (theirs.token_id, theirs.rank)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
    laws, expected = (Sampler(32_000).processed_log_probs(logits.to(d), states(64)) for d in (CUDA, CPU))
    torch.testing.assert_close(laws.cpu(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- transfers and memory --------------------------------------------------------------------------------


def test_parts_arrive_whole_in_one_copy() -> None:
    parts = (torch.arange(5), torch.rand(3, 7), torch.tensor([], dtype=torch.int32), torch.arange(9, dtype=torch.int32))
    for _ in range(50):  # the pinned buffer of one call must not be given to the next before it was read
        arrived = to_device(parts, CUDA)
        assert all(each.device == CUDA for each in arrived)
        assert all(torch.equal(each.cpu(), part) for each, part in zip(arrived, parts, strict=True))


@pytest.mark.skipif("triton_paged" not in ATTENTION, reason="no Triton backend in the registry")
def test_packing_and_the_forward_pass_wait_for_nothing(folder: Path) -> None:
    runner = load(folder, "triton_paged", "bfloat16").runner(32, 16)
    inputs = [SeqInput([1, 2, 3], 20, (0, 1), 23), SeqInput([4], 7, (2,), 8)]
    with torch.inference_mode():
        runner.forward(inputs, [2, 3])  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = runner.forward(inputs, [2, 3])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert logits.dtype is torch.float32 and bool(logits.isfinite().all())


def test_the_pool_takes_what_the_plan_says(folder: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    phases: list[Phase] = []
    model = ModelConfig(str(folder), dtype="bfloat16", graphs="off")  # captured steps keep memory of their own
    config = EngineConfig(model=model, kv=KVConfig(utilization=0.5))
    worker = LocalWorker(config, folder, phases.append)
    capacity = worker.capacity()
    assert capacity.max_model_len == 512  # all that the model declares
    bytes_per_token = 4 * 2 * 2 * 32 * 2  # layers, heads, key and value, head size, bytes
    pool = capacity.num_blocks * capacity.block_size * bytes_per_token
    assert pool <= torch.cuda.memory_allocated() - before <= pool + (256 << 20)  # and the libraries' workspaces
    detail = {phase.name: phase.detail for phase in phases}
    assert "cuda:0" in detail["device"] and "bfloat16" in detail["device"] and "attention" in detail["device"]
    assert "measured" in detail["KV pool"]
    assert torch.cuda.get_device_name(0) in capacity.numerics


def test_the_measured_step_covers_real_ones(folder: Path) -> None:
    """Prompt logprobs of a full chunk beside sampled rows stay inside what was measured."""
    config = EngineConfig(model=ModelConfig(str(folder), dtype="bfloat16"))
    loaded = load_checked(config.model, folder, lambda _: None)
    peak = step_peak(config, loaded, 0)
    worker = load_worker(folder, device="cuda", dtype="bfloat16")
    ladder = Ladder(worker)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prompt = [j % 256 for j in range(400)]
    ladder.run([request(str(i), prompt, 8, temperature=1.0, top_p=0.9, prompt_logprobs=5) for i in range(8)])
    assert torch.cuda.max_memory_allocated() - before <= peak


class Greedy(AutoregressivePipeline):
    """Asks for more memory than there is whenever the request "big" runs, after taking a good part of it."""

    def execute(self, plan: StepPlan) -> StepOutput:
        if any(item.request_id == "big" for item in plan.items):
            taken = torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
            torch.cat([taken, torch.empty(1 << 45, dtype=torch.uint8, device=CUDA)])
        return super().execute(plan)


def test_out_of_memory_ends_the_step_and_gives_everything_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIPELINES, "autoregressive", f"{__name__}:Greedy")
    core = EngineCore(load_worker(folder, device="cuda"), EngineConfig(kv=KVConfig(memory="64MiB")))
    before = torch.cuda.memory_reserved()
    core.add(request("big", [1, 2, 3], 4))
    (update,) = core.step().updates
    assert update.finish is FinishReason.ERROR and DeviceOutOfMemory.__name__ in (update.error or "")
    assert torch.cuda.memory_reserved() <= before
    core.add(request("after", [1, 2, 3], 4))
    tokens = [token for _ in range(8) if core.has_work() for u in core.step().updates for token in u.token_ids]
    core.settle()
    assert len(tokens) == 4 and max(tokens) < VOCAB


# ---- the benchmark ---------------------------------------------------------------------------------------


def test_bench_step_on_the_shape_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("msgspec")
    from server import cli

    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("the shape needs 16 GiB of weights, and ceilings are measured beside them")
    output = tmp_path / "step.json"
    grid = ["--quick", "--batch", "1,32", "--kv", "1000", "--query", "1,8", "--prefill", "512", "--graphs", "off"]
    assert cli.main(["bench", "step", "--dummy", "qwen3-8b", *grid, "--output", str(output)]) == 0
    with capsys.disabled():
        sys.stdout.write(f"\n{capsys.readouterr().out}\n")
    record = json.loads(output.read_text())
    assert record["dtype"] == "bfloat16" and len(record["cases"]) == 5
    decode = record["cases"][0]
    assert 15.0e9 < decode["work"]["gemm_bytes"] < 15.3e9  # 7.57 B parameters of 2 bytes
    assert decode["work"]["attention_bytes"] == pytest.approx(1002 * 144 * 1024)
    assert decode["ms"] >= sum(decode["floors_ms"].values())
    assert set(decode["parts_ms"]) == {"gemm", "attention", "sampling", "rest", "host"}
