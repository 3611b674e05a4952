"""The picture of `bench serve`: a PNG for one load and for several, with answers and without any."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from benchmarks import plots, serve
from benchmarks.serve_load import Outcome
from benchmarks.serve_measures import summarize
from benchmarks.serve_options import Load, parse
from benchmarks.serve_record import OtherCores, Point
from benchmarks.stream import BenchmarkError, Chunk, Timing


def outcome(number: int, kind: str = "ok") -> Outcome:
    chunks = tuple(Chunk(number + 0.1 * i, "x") for i in range(1, 5))
    timing = Timing(float(number), number + 1.0, chunks, 3, 8) if kind == "ok" else None
    return Outcome(number, float(number), number + 1.0, kind, chunks=4, timing=timing)


def point(load: Load, *outcomes: Outcome) -> Point:
    return Point(load, "2026-01-01T00:00:00", outcomes, summarize(outcomes, {}), OtherCores(0, 0, 0), 0.1)


ONE = point(Load(clients=1), *map(outcome, range(3)))
POINTS = {
    "one": [ONE],
    "clients": [ONE, point(Load(clients=8), *map(outcome, range(9)))],
    "rates": [point(Load(rate=rate), outcome(1)) for rate in (0.5, 2.0, float("inf"))],
    "failed": [point(Load(clients=1), outcome(1, "cut"))],
    "some failed": [ONE, point(Load(clients=2), outcome(1, "cut"))],
}


@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
def test_it_is_a_picture(points: list[Point], tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    plots.draw(points, "title", file)
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24]) == (1320, 900)


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for points in POINTS.values():
        for axes in plots.figure_of(points, "title").axes:
            assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()


def test_no_matplotlib_is_known_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match="--plot needs matplotlib"):
        serve.check_plot(parse(["--plot", str(tmp_path / "x.png")]).plot)
