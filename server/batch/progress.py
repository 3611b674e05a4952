"""How far a batch is: a line that moves on a terminal, and a summary."""

from __future__ import annotations

import time
from typing import TextIO

INTERVAL = 0.2  # seconds between two looks of the line
SHOWN = 5  # problems that are told at once; all of them are in the output
BAR = 24  # characters


class Progress:
    """Counts lines, and shows it on `out` if that is a terminal."""

    def __init__(self, total: int, out: TextIO) -> None:
        self.total, self.done, self.bad, self.old = total, 0, 0, 0
        self._out = out
        self._live = out.isatty()
        self._began = self._shown = time.monotonic()

    def answered(self) -> None:
        self.done += 1
        self._show()

    def skipped(self) -> None:
        self.old += 1
        self._show()

    def failed(self, what: str) -> None:
        self.bad += 1
        if self.bad <= SHOWN:
            self._clear()
            rest = " (more are in the output)" if self.bad == SHOWN else ""
            self._out.write(f"slipstream: {ascii(what)[1:-1][:300]}{rest}\n")
        self._show()

    def close(self) -> str:
        """Take the line away; returns the summary."""
        self._clear()
        seconds = time.monotonic() - self._began
        kept = f", {self.old} kept from before" if self.old else ""
        return f"{self.done} answered, {self.bad} failed{kept}, in {seconds:.1f} s"

    def line(self) -> str:
        """`[####----] 12/40  1 failed  3.1/s  9 s left`."""
        ended, seconds = self.done + self.bad + self.old, time.monotonic() - self._began
        share = ended / self.total if self.total else 1.0
        rate = (self.done + self.bad) / seconds if seconds > 0 else 0.0
        full = int(BAR * min(share, 1.0))
        parts = [f"[{'#' * full}{'-' * (BAR - full)}] {ended}/{self.total}"]
        parts += [f"{self.bad} failed"] if self.bad else []
        parts += [f"{rate:.1f}/s", f"{(self.total - ended) / rate:.0f} s left"] if rate > 0 else []
        return "  ".join(parts)

    def _show(self) -> None:
        now = time.monotonic()
        if self._live and now - self._shown >= INTERVAL:
            self._shown = now
            self._out.write(f"\r\x1b[K{self.line()}")
            self._out.flush()

    def _clear(self) -> None:
        if self._live:
            self._out.write("\r\x1b[K")
            self._out.flush()
