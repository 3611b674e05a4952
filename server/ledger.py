"""What an observer is told in every step, kept for a while: counting a hundred things at once costs a tenth of it."""

from __future__ import annotations

from engine.protocols import EngineObserver
from engine.types import EngineStats, RequestSummary

MOST_STEPS, MOST_TOKENS = 64, 256  # that are kept: each lot is counted within about 0.3 ms


class Ledger:
    """An `EngineObserver` before another one, which hears of steps and tokens when `settle` is called, or enough wait.

    Between a step and its chunks nothing is counted: the front process is woken for a moment, beside a model that keeps
    the caches for itself.
    """

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self._steps: list[EngineStats] = []
        self._tokens: list[tuple[int, bool, float]] = []

    def on_step(self, stats: EngineStats) -> None:
        self._steps.append(stats)
        if len(self._steps) >= MOST_STEPS:
            self.settle()

    def on_tokens(self, count: int, first: bool, interval: float) -> None:
        self._tokens.append((count, first, interval))
        if len(self._tokens) >= MOST_TOKENS:
            self.settle()

    def on_finish(self, summary: RequestSummary) -> None:
        self._observer.on_finish(summary)

    def on_rejected(self, reason: str) -> None:
        self._observer.on_rejected(reason)

    def settle(self) -> None:
        """Pass everything on, in order."""
        steps, self._steps = self._steps, []
        tokens, self._tokens = self._tokens, []
        for stats in steps:
            self._observer.on_step(stats)
        for count, first, interval in tokens:
            self._observer.on_tokens(count, first, interval)
