"""How much memory a process has needed so far, and how often Python looks through it."""

from __future__ import annotations

import gc
from pathlib import Path


def peak_memory() -> int:
    """Peak resident bytes of this process; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def calm_collector() -> None:
    """Call once a process is set up. Garbage in cycles is looked for seldom, and never among what is there already.

    A step of many sequences makes more objects than the usual threshold (700), so that each step would begin several
    searches, and now and then one through everything that torch and its friends have made: 0.3 s in which all wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
