"""How much memory a process has needed so far."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """Peak resident bytes of this process; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
