"""How many CPU cores the engine may keep busy: the machine's, its affinity's, or its container's if that is less."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def usable_cores(cgroup: Path = _CGROUP, cpus: Path = _CPUS) -> int:
    """Physical cores that this process may use, at least 1.

    Hyper-threads count once: they slow matrix products down. A quota (`docker run --cpus`, a limit in Kubernetes)
    counts in whole cores: threads beyond it are stopped for the rest of each period, in the middle of their barriers.
    """
    cores = _physical(os.sched_getaffinity(0), cpus)
    quota = _quota(cgroup)
    return max(cores if quota is None else min(cores, int(quota)), 1)


def threads_of(cores: int, share: float) -> int:
    """Whole cores of a share, at least 1: two engines that overlap on one core cost both more than it gives."""
    return max(1, int(cores * share + 1e-6))


def _physical(allowed: set[int], cpus: Path) -> int:
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add((cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed)
    return len(siblings)


def _quota(cgroup: Path) -> float | None:
    """Cores of the control group's quota, version 2 or 1; None where there is none."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None
