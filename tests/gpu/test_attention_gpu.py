"""triton_paged and flash on a CUDA device against the sdpa backend in fp32, at the shapes of real models."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from engine.attention.flash import FlashAttention
from engine.attention.triton_paged import TritonPagedAttention
from engine.errors import ConfigError
from engine.protocols import AttentionBackend
from engine.runtime.batch import DeviceBatch
from engine.runtime.kv_cache import LayerCache
from tests.kernels.cases import Case
from tests.kernels.scenario import Scenario

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this build of torch finds no CUDA device"),
]
CUDA = torch.device("cuda")
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
QWEN3_8B = Case(kv_heads=8, fold=4, dims=(128, 128), dtype="bfloat16")
GPT_OSS = Case(kv_heads=8, fold=8, dims=(64, 64), dtype="bfloat16", window=128, sinks=True)
GEMMA_2 = Case(kv_heads=4, fold=2, dims=(256, 256), dtype="bfloat16", window=700, softcap=50.0)
PHI = Case(kv_heads=8, fold=4, dims=(80, 80), dtype="float16")
TINY = Case(kv_heads=2, fold=3, dims=(24, 16), dtype="float32")
MODELS = {"qwen3-8b": QWEN3_8B, "gpt-oss": GPT_OSS, "gemma-2": GEMMA_2, "phi": PHI, "tiny": TINY}
LENGTHS = {
    "decode": tuple((1, 200 + 37 * i) for i in range(32)),
    "one long decode": ((1, 30_000),),
    "verify": tuple((16, 500 + 61 * i) for i in range(8)),
    "prefill": ((1500, 1500), (300, 900)),
    "mixed": ((1, 3000), (512, 800), (16, 40), (1, 1), (5, 5), (33, 700)),
}


def on_gpu(scenario: Scenario) -> Scenario:
    """The same scenario with its tensors on the device."""
    scenario.batch, scenario.exact = moved(scenario.batch), moved(scenario.exact)
    scenario.cache = LayerCache(scenario.cache.joint.to(CUDA), scenario.cache.shape)
    scenario.query = scenario.query.to(CUDA)
    scenario.sinks = None if scenario.sinks is None else scenario.sinks.to(CUDA)
    return scenario


def moved(batch: DeviceBatch) -> DeviceBatch:
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: part.to(CUDA) for name, part in parts.items() if isinstance(part, torch.Tensor)}
    return replace(batch, **tensors)  # type: ignore[arg-type]


def check(backend: AttentionBackend, case: Case) -> None:
    scenario = on_gpu(Scenario(case))
    step = backend.prepare(scenario.batch)
    got = scenario.attend(step)
    assert scenario.error(got) < TOLERANCE[case.dtype]
    assert torch.equal(scenario.attend(step), got), "the second layer of a step differs from the first"


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_triton_at_real_shapes(model: str, lengths: str) -> None:
    check(TritonPagedAttention(), replace(MODELS[model], lengths=LENGTHS[lengths]))


@pytest.mark.parametrize("page", [1, 7, 16, 32, 256])
@pytest.mark.parametrize("mode", ["causal", "block_causal", "bidirectional", "tree"])
def test_triton_in_every_mode_and_page_size(mode: str, page: int) -> None:
    for options in (QWEN3_8B, replace(QWEN3_8B, window=100, softcap=20.0, sinks=True)):
        check(TritonPagedAttention(), replace(options, mode=mode, page=page, lengths=LENGTHS["mixed"]))


@pytest.mark.parametrize("query", [1, 16])
def test_a_captured_step_follows_its_tensors(query: int) -> None:
    """Planned for 4,000 keys, captured, and replayed over other lengths, positions and pages."""
    longest = on_gpu(Scenario(replace(QWEN3_8B, lengths=((query, 4000),) * 4)))
    step = TritonPagedAttention().prepare(longest.batch)
    longest.attend(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = longest.attend(step)
    for seed, keys in enumerate(((4000, 4000, 4000, 4000), (900, 16, 2000, 333))):
        other = on_gpu(Scenario(replace(QWEN3_8B, lengths=tuple((query, n) for n in keys)), seed))
        longest.query.copy_(other.query)
        longest.batch.kv_lens.copy_(other.batch.kv_lens)
        longest.batch.positions.copy_(other.batch.positions)
        width = other.batch.block_tables.shape[1]
        longest.batch.block_tables[:, :width].copy_(other.batch.block_tables)
        longest.cache.joint[: other.cache.joint.shape[0]].copy_(other.cache.joint)
        graph.replay()
        assert other.error(out) < TOLERANCE["bfloat16"]


def test_a_step_without_a_plan_is_not_captured() -> None:
    scenario = on_gpu(Scenario(replace(QWEN3_8B, lengths=((1, 100),))))
    step = TritonPagedAttention().prepare(scenario.batch)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scenario.query.mul_(1)  # torch warns of a graph without work
        with pytest.raises(RuntimeError, match="must attend once before it is captured"):
            scenario.attend(step)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("model", ["qwen3-8b", "gemma-2", "gpt-oss"])
def test_flash_at_real_shapes(model: str, lengths: str) -> None:
    try:
        backend = FlashAttention()
    except ConfigError as error:
        pytest.skip(str(error))
    check(backend, replace(MODELS[model], lengths=LENGTHS[lengths], page=256))
