"""`slipstream serve` with a PacedWorker, and with a watch: the server's side of `benchmarks.front`.

SIGUSR1 has it say how much processor time its process has used so far, and how much of that in the system. With a file
as its first argument, SIGUSR2 starts cProfile on the thread of the event loop, and the next one stops it and writes the
file.
"""

from __future__ import annotations

import cProfile
import functools
import resource
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

PACED_WORKER = "benchmarks.null_worker:PacedWorker"
MARK = "front cpu and system seconds "  # what a log line is found by


def main(arguments: Sequence[str]) -> int:
    """`PROFILE ARGUMENTS-OF-SLIPSTREAM...`; the profile's name may be empty."""
    file, *rest = arguments
    signal.signal(signal.SIGUSR1, _say)
    if file:
        signal.signal(signal.SIGUSR2, _Profiler(file).toggle)
    import engine.async_engine as module
    from server.cli import main as run

    patched = functools.partial(module.AsyncEngine, worker=PACED_WORKER)
    vars(module)["AsyncEngine"] = patched
    sys.argv = ["slipstream", *rest]
    return run()


def _say(_signal: int, _frame: FrameType | None) -> None:
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    sys.stderr.write(f"{MARK}{time.process_time():.6f} {system:.6f}\n")
    sys.stderr.flush()


class _Profiler:
    def __init__(self, file: str) -> None:
        self._file = file
        self._profile = cProfile.Profile()
        self._on = False

    def toggle(self, _signal: int, _frame: FrameType | None) -> None:
        self._on = not self._on
        if self._on:
            self._profile.enable()
        else:
            self._profile.disable()
            self._profile.dump_stats(self._file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
