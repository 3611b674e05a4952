"""Numbers into words: medians, percentiles, paired ratios, tables, and where the code stands."""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[1]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("no values")
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def spread(values: Sequence[float]) -> str:
    """Median and range, with three digits that mean something: "27.1 (25.0-30.2)"."""
    if not values:
        return "-"
    median = show(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({show(min(values))}-{show(max(values))})"


def show(value: float) -> str:
    """A number with about three significant digits."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def paired_ratios(ours: Sequence[float], theirs: Sequence[float], *, higher_is_better: bool) -> list[float]:
    """How many times better we are in each round; above 1 is better for us, whatever the unit."""
    pairs = zip(ours, theirs, strict=True)
    return [mine / other if higher_is_better else other / mine for mine, other in pairs]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first row is the head, the first column is aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same rows for a page."""
    head, *body = rows
    lines = [head, ["---", *("--:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure_table(title: str, figures: Mapping[str, Sequence[float]]) -> str:
    """One row per figure, its median and range."""
    return table([[title, "median (range)"], *([name, spread(values)] for name, values in figures.items())])


def git_commit() -> str:
    """The commit that is checked out, with "+changes" when the tree differs from it; "unknown" outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_record(file: Path, command: str, other_cores: float, found: Mapping[str, object]) -> None:
    """JSON of what was measured, by which command, on which commit and machine, and beside how much other load."""
    record = {
        "command": command,
        "commit": git_commit(),
        "machine": machine(),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "other_processes_cores": other_cores,
        **found,
    }
    plain = msgspec.to_builtins(record, enc_hook=str)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(plain)) + b"\n")


def machine() -> str:
    """Processor and cores, for the record."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = sum(line.startswith("processor") for line in lines)
    return f"{model or platform.machine()}, {cores} cores"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
