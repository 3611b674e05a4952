"""The cores of an engine process: affinity, hyper-threads, and a container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.runtime.cores import threads_of, usable_cores


def machine(folder: Path, siblings: dict[int, str]) -> Path:
    """A made-up /sys/devices/system/cpu."""
    for cpu, text in siblings.items():
        topology = folder / f"cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text)
    return folder


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs that are four cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return machine(tmp_path / "cpus", {cpu: f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)})


def test_hyper_threads_count_once(eight: Path, tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", eight) == 4


def test_without_a_topology_every_cpu_counts(eight: Path, tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "nowhere") == 8


@pytest.mark.parametrize(
    "text, cores",
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 4),
        ("max 100000", 4),
        ("", 4),
        ("nonsense", 4),
    ],
)
def test_a_quota_of_version_2(eight: Path, tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert usable_cores(tmp_path, eight) == cores


@pytest.mark.parametrize("quota, cores", [("300000", 3), ("-1", 4)])
def test_a_quota_of_version_1(eight: Path, tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path, eight) == cores


@pytest.mark.parametrize(
    ("cores", "share", "threads"),
    [(2, 1.0, 2), (2, 0.5, 1), (1, 0.5, 1), (3, 0.5, 1), (16, 0.9, 14), (16, 0.05, 1), (6, 1 / 3, 2), (100, 0.29, 29)],
)
def test_engines_divide_whole_cores(cores: int, share: float, threads: int) -> None:
    assert threads_of(cores, share) == threads
