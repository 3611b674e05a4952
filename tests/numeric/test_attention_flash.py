"""The flash backend over modules that mean what flash-attn's documentation says, against the sdpa backend."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from engine.attention import flash
from engine.attention.flash import Flash2, Flash3, FlashAttention, FlashLibrary
from engine.attention.sdpa import SdpaAttention
from engine.attention.triton_paged import TritonPagedAttention
from engine.errors import ConfigError
from engine.runtime.batch import AttentionMode, SeqInput, TreeRows, pack
from engine.runtime.kv_cache import LayerCache, LayerShape, PagedKVCache
from tests.numeric import fake_flash_attn, fake_flash_attn_interface

CPU = torch.device("cpu")
BLOCK = {"flash_attn": 256, "flash_attn_interface": 16}
MODULES: dict[str, ModuleType] = {
    "flash_attn": fake_flash_attn,
    "flash_attn_interface": fake_flash_attn_interface,
}
LENGTHS = {
    "decode": [(1, 300), (1, 2), (1, 1)],
    "verify": [(9, 300), (9, 9)],
    "mixed": [(1, 30), (9, 300), (80, 90)],
    "long alone": [(70, 80)],
}
SHAPE = LayerShape(2, 16, 16)


@pytest.fixture(scope="module", params=MODULES)
def backend(request: pytest.FixtureRequest) -> FlashAttention:
    return FlashAttention(library(request.param), SdpaAttention(), CPU)


def library(name: str) -> FlashLibrary:
    return Flash2(MODULES[name]) if name == "flash_attn" else Flash3(MODULES[name])


def calls_of(backend: FlashAttention) -> list[str]:
    """Of the module below; emptied."""
    module = fake_flash_attn if backend.library.page_multiple == 256 else fake_flash_attn_interface
    found = module.calls.copy()
    module.calls.clear()
    return found


def pool(shape: LayerShape, block: int, dtype: torch.dtype = torch.bfloat16) -> LayerCache:
    cache = PagedKVCache((shape,), 1 + 600 // block, block, dtype, CPU).layers[0]
    torch.nn.init.normal_(cache.joint)
    return cache


def inputs(lengths: list[tuple[int, int]], block: int, behind: int = 0, tree: bool = False) -> list[SeqInput]:
    """Sequences over one scattered set of blocks, which they may share: nothing writes."""
    table = torch.randperm(1 + 600 // block, generator=torch.Generator().manual_seed(1)).tolist()
    return [
        SeqInput([1] * m, n - m - behind, table, n, TreeRows(n - m, range(n - m, n), [1] * m) if tree else None)
        for m, n in lengths
    ]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0), (20, 3.0)])
@pytest.mark.parametrize("mode", [AttentionMode.CAUSAL, AttentionMode.BIDIRECTIONAL])
@pytest.mark.parametrize("name", LENGTHS)
def test_flash_equals_sdpa(
    backend: FlashAttention, name: str, mode: AttentionMode, window: int | None, softcap: float | None
) -> None:
    block = max(backend.library.page_multiple, 16)
    batch = pack(inputs(LENGTHS[name], block), block, CPU, mode)
    cache, query = pool(SHAPE, block), torch.randn(batch.ids.numel(), 6, 16).bfloat16()
    calls_of(backend)
    got = backend.prepare(batch).attend(query, cache, scale=0.3, window=window, softcap=softcap)
    varlen = backend.library.page_multiple == 256 and name in ("mixed", "long alone")
    assert calls_of(backend) == ["varlen" if varlen else "with_kvcache"]
    expected = SdpaAttention().prepare(batch).attend(query, cache, scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)


@dataclass(frozen=True)
class Asked:
    mode: AttentionMode = AttentionMode.CAUSAL
    tree: bool = False
    sinks: bool = False
    behind: int = 0
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16
    shape: LayerShape = SHAPE


DELEGATED = {
    "a tree": Asked(AttentionMode.TREE, tree=True),
    "block-causal": Asked(AttentionMode.BLOCK_CAUSAL),
    "sinks": Asked(sinks=True),
    "keys past the queries": Asked(behind=2),
    "a window, keys past the queries": Asked(AttentionMode.BIDIRECTIONAL, behind=2, window=5),
    "fp32": Asked(dtype=torch.float32),
    "an odd width": Asked(shape=LayerShape(2, 20, 20)),
    "values of another width": Asked(shape=LayerShape(2, 16, 8)),
    "wide heads": Asked(shape=LayerShape(2, 264, 264)),
}


@pytest.mark.parametrize("why", DELEGATED)
def test_what_flash_cannot_do_is_delegated(backend: FlashAttention, why: str) -> None:
    asked = DELEGATED[why]
    block = max(backend.library.page_multiple, 16)
    batch = pack(inputs(LENGTHS["verify"], block, asked.behind, asked.tree), block, CPU, asked.mode, 4)
    cache = pool(asked.shape, block, asked.dtype)
    query = torch.randn(batch.ids.numel(), 6, asked.shape.key_dim).to(asked.dtype)
    sinks = torch.randn(6) if asked.sinks else None
    calls_of(backend)
    got, expected = (
        step.attend(query, cache, scale=0.3, window=asked.window, sinks=sinks)
        for step in (backend.prepare(batch), SdpaAttention().prepare(batch))
    )
    assert calls_of(backend) == [] and torch.equal(got, expected)


def test_keys_past_the_queries_are_no_matter_without_a_mask(backend: FlashAttention) -> None:
    block = max(backend.library.page_multiple, 16)
    batch = pack(inputs(LENGTHS["verify"], block, behind=2), block, CPU, AttentionMode.BIDIRECTIONAL)
    cache, query = pool(SHAPE, block), torch.randn(18, 6, 16).bfloat16()
    got = backend.prepare(batch).attend(query, cache, scale=0.3)
    assert calls_of(backend)[-1:] == ["with_kvcache"]
    torch.testing.assert_close(got, SdpaAttention().prepare(batch).attend(query, cache, scale=0.3), rtol=0, atol=2e-2)


def test_flash_2_leaves_small_pages_to_the_fallback_and_says_so() -> None:
    backend = FlashAttention(library("flash_attn"), SdpaAttention(), CPU)
    batch = pack(inputs(LENGTHS["decode"], 16), 16, CPU)
    calls_of(backend)
    backend.prepare(batch).attend(torch.randn(3, 6, 16).bfloat16(), pool(SHAPE, 16), scale=0.3)
    assert calls_of(backend) == []
    backend.check_block_size(512)
    with pytest.raises(ConfigError, match=r"kv\.block_size: flash_attn 2\.8\.3 .* multiple of 256 tokens, not 16"):
        backend.check_block_size(16)
    FlashAttention(library("flash_attn_interface"), SdpaAttention(), CPU).check_block_size(16)


@pytest.mark.parametrize("wrong", ["mask", "nan"])
def test_a_library_that_disagrees_is_refused(wrong: str) -> None:
    class Wrong(Flash2):
        def attend(self, query, pages, lengths, options):
            out = super().attend(query, pages, lengths, options)
            if wrong == "nan":
                return torch.where(torch.arange(out.shape[0])[:, None, None] == 8, float("nan"), out)
            return out.flip(0) if options.causal else out

    with pytest.raises(ConfigError, match="attention flash: differs from the reference by"):
        FlashAttention(Wrong(fake_flash_attn), SdpaAttention(), CPU)


def test_the_self_check_reports_rounding_alone(backend: FlashAttention) -> None:
    assert 0 < backend.error < 1e-2


@pytest.mark.parametrize(("capability", "named"), [((8, 0), "flash_attn"), ((9, 0), "flash_attn_interface")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], named: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ConfigError, match=f"flash_attn_interface .*No module named '{named}'"):
        flash.installed()


@pytest.mark.parametrize("backend_class", [FlashAttention, TritonPagedAttention])
def test_gpu_backends_say_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, backend_class: type[FlashAttention] | type[TritonPagedAttention]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"attention (flash|triton_paged) needs a CUDA device"):
        backend_class()
