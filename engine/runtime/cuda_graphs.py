"""Functions over fixed tensors, run again and again: as CUDA graphs where there is a GPU, as they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

_LITTLE, _MIDDLE, _MUCH = 8, 64, 256


def buckets(most: int) -> tuple[int, ...]:
    """Batch sizes that steps are captured for, rising, up to the first that holds `most` sequences, or 256.

    1, 2, 4, 8, then every 8 up to 64 and every 16 up to 256: padding costs a step little where it is bound by the
    weights it reads, and each graph costs time at the start.
    """
    sizes = [1, 2, 4, *range(_LITTLE, _MIDDLE, 8), *range(_MIDDLE, _MUCH + 1, 16)]
    enough = next((place for place, size in enumerate(sizes) if size >= most), len(sizes) - 1)
    return tuple(sizes[: enough + 1])


class GraphPool:
    """Bodies by key. All graphs share one pool of memory: no two of them run at a time, and none keeps its results.

    Add the largest first, or the smaller ones leave the pool in pieces that it can't use.
    """

    def __init__(self, device: torch.device, *, capture: bool) -> None:
        self._device = device
        self._capture = capture
        self._runs: dict[Hashable, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._runs

    def __len__(self) -> int:
        return len(self._runs)

    @torch.inference_mode()
    def add(self, key: Hashable, body: Callable[[], None]) -> None:
        """Take `body` in, run once before it is captured: what it compiles and keeps must be there by then.

        Raises RuntimeError where it can't be captured: it waits for the device, or has work of its own on the host.
        """
        if not self._capture:
            self._runs[key] = body
            return
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            body()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        self._runs[key] = graph.replay

    @torch.inference_mode()
    def run(self, key: Hashable) -> None:
        """Queue the work of this body on the current stream."""
        self._runs[key]()
