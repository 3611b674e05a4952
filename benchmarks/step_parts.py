"""Where a step's time goes: matrix products, attention, sampling and the rest, each with the work that it did.

While `Parts` watches a runner, hooks note the time before and after every linear layer, and attention runs inside a
wrapper. On a CPU that is the host's clock. On CUDA these are events in the stream, and each step begins with a sleep
on the device, long enough for the host to queue the whole step behind it: so a part's time is that of its kernels,
without the gaps in which a device waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType

import torch
from torch import nn

from engine.protocols import AttentionBackend, StepAttention
from engine.runtime.batch import AttentionMode, DeviceBatch
from engine.runtime.kv_cache import LayerCache
from engine.runtime.linear import NativeLinear, PackedLinear
from engine.runtime.runner import ModelRunner

Mark = float | torch.cuda.Event
_CYCLES_PER_SECOND = 2e9  # at most: a sleep may be longer than asked for


@dataclass(slots=True)
class Work:
    """What the parts of one step had to do, counted: nothing is counted twice, and caches are not thought of."""

    gemm_flops: float = 0.0
    gemm_bytes: float = 0.0  # weights, each once
    attention_flops: float = 0.0
    attention_bytes: float = 0.0  # keys and values read by each sequence, and written


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of one step by part; `device` from its begin to its end, without a wait for the host on CUDA."""

    device: float
    parts: dict[str, float]
    work: Work


@dataclass(slots=True)
class Parts:
    """Watches the steps of a runner for as long as the block lasts; see `step`."""

    runner: ModelRunner
    device: torch.device
    _spans: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    _work: Work = field(default_factory=Work)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def __enter__(self) -> Parts:
        attention = self.runner.attention
        self.runner.attention = WatchedAttention(attention, self)
        self._undo.append(lambda: setattr(self.runner, "attention", attention))
        for module in self.runner.adapter.model.modules():
            if is_matrix_product(module):
                began: list[Mark] = []
                before = module.register_forward_pre_hook(lambda *_, began=began: began.append(self.mark()))
                after = module.register_forward_hook(
                    lambda layer, inputs, out, began=began: self._product(layer, inputs[0], out, began.pop())
                )
                self._undo += [before.remove, after.remove]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()

    def step(self, run: Callable[[], object], expected: float) -> Split:
        """Split one step that takes about `expected` seconds."""
        self._spans.clear()
        self._work = Work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(int(2 * expected * _CYCLES_PER_SECOND))
        begin = self.mark()
        run()
        end = self.mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = {}
        for name, first, last in self._spans:
            parts[name] = parts.get(name, 0.0) + _between(first, last)
        total = _between(begin, end)
        parts["rest"] = total - sum(parts.values())
        return Split(total, parts, self._work)

    @contextmanager
    def span(self, name: str) -> Iterator[Work]:
        """Count what runs in the block as part `name`. Spans must not overlap."""
        begin = self.mark()
        yield self._work
        self._spans.append((name, begin, self.mark()))

    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _product(self, layer: nn.Module, x: torch.Tensor, out: torch.Tensor, began: Mark) -> None:
        self._spans.append(("gemm", began, self.mark()))
        self._work.gemm_flops += 2.0 * x.numel() * out.shape[-1]
        self._work.gemm_bytes += bytes_of(layer)


def native_split(split: Split, profile: Mapping[str, float], work: Work) -> Split:
    """What a native program's clock says of a step, which `split` timed from outside; all kinds have their parts.

    `profile` is that of one pass, of its first thread: what that waits for the others is a part of its own, "waiting".
    """
    seconds = {kind: value for kind, value in profile.items() if kind != "calls"}
    gemm = seconds.pop("products") + seconds.pop("head")
    known = {name: value for name, value in split.parts.items() if name != "rest"}
    parts = {"gemm": gemm, **seconds, **known}
    return Split(split.device, {**parts, "rest": max(split.device - sum(parts.values()), 0.0)}, work)


def _between(first: Mark, last: Mark) -> float:
    """Seconds; both marks are of one kind."""
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        return float(first.elapsed_time(last)) / 1000
    assert isinstance(first, float) and isinstance(last, float)
    return last - first


def is_matrix_product(module: nn.Module) -> bool:
    """A layer without children that multiplies by a matrix: plain, transposed or packed."""
    if any(True for _ in module.children()) or isinstance(module, nn.Embedding):
        return False
    weight = plain_weight(module)
    return (weight is not None and weight.dim() == 2) or "Linear" in type(module).__name__


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The parameter of that name; None for a layer that keeps its weight in a form of its own."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def bytes_of(layer: nn.Module) -> int:
    """What a product must read of its weights."""
    if isinstance(layer, NativeLinear | PackedLinear):
        return layer.packed_bytes
    weight = plain_weight(layer)
    assert weight is not None
    return weight.nbytes


@dataclass(frozen=True, slots=True)
class WatchedAttention:
    """A backend whose time and work are counted."""

    inner: AttentionBackend
    parts: Parts

    def check_block_size(self, block_size: int) -> None:
        """Any will do."""

    def prepare(self, batch: DeviceBatch) -> WatchedStep:
        with self.parts.span("attention"):
            return WatchedStep(self.inner.prepare(batch), batch, self.parts)


@dataclass(frozen=True, slots=True)
class WatchedStep:
    inner: StepAttention
    batch: DeviceBatch
    parts: Parts

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
        with self.parts.span("attention") as work:
            out = self.inner.attend(query, cache, scale=scale, window=window, softcap=softcap, sinks=sinks)
        shape, slots = cache.shape, 0
        for query_len, kv_len in zip(self.batch.query_lens, self.batch.kv_lens_host, strict=True):
            pairs, seen = visible(query_len, kv_len, window, self.batch.mode is AttentionMode.CAUSAL)
            work.attention_flops += 2.0 * pairs * query.shape[1] * (shape.key_dim + shape.value_dim)
            slots += seen + query_len
        work.attention_bytes += slots * shape.width * cache.joint.itemsize
        return out


@lru_cache(maxsize=4096)
def visible(query_len: int, kv_len: int, window: int | None, causal: bool) -> tuple[int, int]:
    """(query-key pairs to score, different keys to read) of one sequence whose queries are its last positions."""
    if not causal:
        return query_len * kv_len, kv_len
    reach = kv_len if window is None else window
    first = kv_len - query_len
    pairs = sum(min(position + 1, reach) for position in range(first, kv_len))
    return pairs, min(kv_len, reach + query_len - 1)
