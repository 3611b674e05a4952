"""flash-attn as a fast path behind the same contract: FlashAttention-3 where it is installed, else FlashAttention-2.

Neither knows every mask: steps and layers they cannot do (block-causal, trees, sinks, other types and widths, FA2 on
pages that are no multiple of 256 tokens) are attended by `triton_paged`, which also judges them at start-up. Both
align a causal mask with the last key, so they are asked only where a step's queries are its sequences' last tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import torch

from engine.attention.triton_paged import TritonPagedAttention
from engine.errors import ConfigError
from engine.protocols import AttentionBackend, StepAttention
from engine.runtime.batch import AttentionMode, DeviceBatch, SeqInput, pack
from engine.runtime.kv_cache import LayerCache, LayerShape, PagedKVCache

MAX_UNIFORM_QUERY = 64  # FA2 splits keys for short queries of one length, in its decoding function alone
MAX_HEAD_DIM = 256
HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = 2e-2  # of the largest output, between two kernels that round to bfloat16 in places of their own


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """One layer's pool as flash-attn sees it: key and value [blocks, block_size, kv_heads, dim], views."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Options:
    """`window` is (keys before, keys after) a query's own, -1 for all; softcap 0 is none."""

    scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float


@dataclass(slots=True, eq=False)
class Lengths:
    """A step's lengths as flash-attn wants them. Its tensors are the batch's own, so a captured graph follows them."""

    batch: DeviceBatch
    max_query: int
    max_key: int
    uniform: int  # the length of all queries, 0 if they differ
    _key_starts: torch.Tensor | None = None

    @property
    def key_starts(self) -> torch.Tensor:
        """[n + 1] int32, running sum of kv_lens; made once per step."""
        if self._key_starts is None:
            lens = self.batch.kv_lens
            self._key_starts = torch.cat((lens.new_zeros(1), lens.cumsum(0, dtype=torch.int32)))
        return self._key_starts


class FlashLibrary(Protocol):
    """One generation of flash-attn. `page_multiple`: block sizes must be a multiple of it."""

    name: str
    page_multiple: int

    def attend(self, query: torch.Tensor, pages: Pages, lengths: Lengths, options: Options) -> torch.Tensor:
        """query [T, heads, dim] -> [T, heads, dim]."""
        ...


class Flash2:
    """The module `flash_attn`, 2.6 or newer."""

    page_multiple = 256

    def __init__(self, module: ModuleType) -> None:
        self.name = f"flash_attn {getattr(module, '__version__', '2')}"
        self._varlen: Callable[..., torch.Tensor] = module.flash_attn_varlen_func
        self._with_kvcache: Callable[..., torch.Tensor] = module.flash_attn_with_kvcache

    def attend(self, query: torch.Tensor, pages: Pages, lengths: Lengths, options: Options) -> torch.Tensor:
        batch = lengths.batch
        common = {
            "softmax_scale": options.scale,
            "causal": options.causal,
            "window_size": options.window,
            "softcap": options.softcap,
            "block_table": batch.block_tables,
        }
        if 0 < lengths.uniform <= MAX_UNIFORM_QUERY:
            rows = query.view(batch.num_seqs, lengths.uniform, *query.shape[1:])
            out = self._with_kvcache(rows, pages.key, pages.value, cache_seqlens=batch.kv_lens, **common)
            return out.view(query.shape)
        return self._varlen(
            query,
            pages.key,
            pages.value,
            cu_seqlens_q=batch.query_starts,
            cu_seqlens_k=lengths.key_starts,
            max_seqlen_q=lengths.max_query,
            max_seqlen_k=lengths.max_key,
            **common,
        )


class Flash3:
    """The module `flash_attn_interface` (FlashAttention-3), which splits keys for queries of mixed lengths too."""

    page_multiple = 1

    def __init__(self, module: ModuleType) -> None:
        self.name = "flash_attn_interface (FlashAttention-3)"
        self._with_kvcache: Callable[..., torch.Tensor] = module.flash_attn_with_kvcache

    def attend(self, query: torch.Tensor, pages: Pages, lengths: Lengths, options: Options) -> torch.Tensor:
        return self._with_kvcache(
            query,
            pages.key,
            pages.value,
            cache_seqlens=lengths.batch.kv_lens,
            page_table=lengths.batch.block_tables,
            cu_seqlens_q=lengths.batch.query_starts,
            max_seqlen_q=lengths.max_query,
            softmax_scale=options.scale,
            causal=options.causal,
            window_size=options.window,
            softcap=options.softcap,
        )


@dataclass(slots=True, eq=False)
class FlashStep:
    """See `protocols.StepAttention`."""

    lengths: Lengths
    library: FlashLibrary
    fallback: AttentionBackend
    _fallback_step: StepAttention | None = field(default=None)

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch = self.lengths.batch
        if sinks is not None or not self.can(query, cache, window):
            if self._fallback_step is None:
                self._fallback_step = self.fallback.prepare(batch)
            return self._fallback_step.attend(query, cache, scale=scale, window=window, softcap=softcap, sinks=sinks)
        causal = batch.mode is AttentionMode.CAUSAL
        sides = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
        pages = Pages(*(part.unflatten(0, (-1, batch.block_size)) for part in (cache.key, cache.value)))
        return self.library.attend(query, pages, self.lengths, Options(scale, causal, sides, softcap or 0.0))

    def can(self, query: torch.Tensor, cache: LayerCache, window: int | None) -> bool:
        """Can flash-attn do this layer (without sinks)?"""
        batch, shape = self.lengths.batch, cache.shape
        if batch.mode is AttentionMode.CAUSAL:
            masked = batch.aligned
        else:
            masked = batch.mode is AttentionMode.BIDIRECTIONAL and (window is None or batch.aligned)
        wide = shape.key_dim == shape.value_dim <= MAX_HEAD_DIM and shape.key_dim % 8 == 0
        typed = query.dtype is cache.joint.dtype and query.dtype in HALVES
        return masked and wide and typed and batch.block_size % self.library.page_multiple == 0


class FlashAttention:
    """See `protocols.AttentionBackend`. Raises ConfigError where flash-attn is missing or disagrees."""

    def __init__(
        self,
        library: FlashLibrary | None = None,
        fallback: AttentionBackend | None = None,
        device: torch.device | None = None,
    ) -> None:
        """The arguments stand in for what is installed, the Triton kernel, and the current CUDA device."""
        if device is None and not torch.cuda.is_available():
            raise ConfigError(f"attention flash needs a CUDA device, and torch {torch.__version__} finds none")
        self.library = library or installed()
        self._fallback = fallback or TritonPagedAttention()
        self.error = self_check(self, self._fallback, device or torch.device("cuda"))

    def prepare(self, batch: DeviceBatch) -> FlashStep:
        uniform = batch.query_lens[0] if len(set(batch.query_lens)) == 1 else 0
        lengths = Lengths(batch, max(batch.query_lens), max(batch.kv_lens_host), uniform)
        return FlashStep(lengths, self.library, self._fallback)

    def check_block_size(self, block_size: int) -> None:
        """Raises ConfigError for a pool that this library cannot read, which would all be left to the fallback."""
        if block_size % self.library.page_multiple:
            raise ConfigError(
                f"kv.block_size: {self.library.name} reads blocks of a multiple of {self.library.page_multiple} tokens"
                f", not {block_size}; set it so, or models.attention to triton_paged"
            )


def installed() -> FlashLibrary:
    """FlashAttention-3 on Hopper, else FlashAttention-2. Raises ConfigError if neither can be imported."""
    missing = []
    if torch.cuda.get_device_capability()[0] == 9:
        try:
            import flash_attn_interface

            return Flash3(flash_attn_interface)
        except ImportError as error:
            missing.append(str(error))
    try:
        import flash_attn

        return Flash2(flash_attn)
    except ImportError as error:
        missing.append(str(error))
    raise ConfigError(
        "attention flash needs the package flash_attn (2.6 or newer), or flash_attn_interface (FlashAttention-3) on a "
        f"Hopper GPU: {'; '.join(missing)}"
    )


@torch.inference_mode()
def self_check(backend: AttentionBackend, reference: AttentionBackend, device: torch.device) -> float:
    """Largest difference between two backends on random data, relative to the largest output.

    Decode, verify and prefill, with and without window and soft cap. Raises ConfigError when they disagree.
    """
    block, heads, shape = 256, 4, LayerShape(2, 64, 64)
    generator = torch.Generator(device).manual_seed(20260101)
    cache = PagedKVCache((shape,), 9, block, torch.bfloat16, device).layers[0]
    cache.joint.normal_(generator=generator)
    worst = 0.0
    for queries, keys in (((1, 1), (600, 7)), ((9, 9), (300, 9)), ((1, 40, 90), (257, 300, 90))):
        tables = [tuple(range(8 - 3 * i, 5 - 3 * i, -1)) for i in range(3)]
        inputs = [SeqInput([0] * m, n - m, table, n) for m, n, table in zip(queries, keys, tables, strict=False)]
        for mode in (AttentionMode.CAUSAL, AttentionMode.BIDIRECTIONAL):
            batch = pack(inputs, block, device, mode)
            query = torch.randn(sum(queries), heads, 64, generator=generator, device=device).bfloat16()
            for window, softcap in ((None, None), (100, 20.0)):
                got, expected = (
                    chosen.prepare(batch).attend(query, cache, scale=0.125, window=window, softcap=softcap).float()
                    for chosen in (backend, reference)
                )
                error = float((got - expected).abs().max() / expected.abs().max())
                worst = max(worst, error) if error == error else float("nan")
    if not worst <= TOLERANCE:
        raise ConfigError(
            f"attention flash: differs from the reference by {worst:.2g} of the largest output (allowed: {TOLERANCE})"
        )
    return worst
