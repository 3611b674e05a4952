"""Draw a Grafana dashboard without Grafana: every panel's queries, answered by a real Prometheus, in the same grid.

    python -m benchmarks.dashboard --prometheus http://127.0.0.1:9090 --minutes 10 --png dashboard.png

It shows whether the queries are right and what an operator would see; the drawing is our own, and says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.dashboard_picture import draw

DASHBOARD = Path("deploy/grafana/dashboards/slipstream.json")
POINTS = 240  # per curve


@dataclass(frozen=True, slots=True)
class Curve:
    """One series of a panel: times in seconds since the epoch, and values (NaN where there is none)."""

    legend: str
    times: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel with its answers. `place` is (x, y, width, height) in Grafana's grid of 24 columns."""

    title: str
    kind: str
    place: tuple[int, int, int, int]
    unit: str
    stacked: bool
    limits: tuple[float | None, float | None]
    steps: tuple[tuple[float | None, str], ...]
    curves: tuple[Curve, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Query and draw; the exit status is 1 when a query fails, or when no panel has any data."""
    parser = argparse.ArgumentParser(prog="benchmarks.dashboard", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, metavar="FILE.json")
    parser.add_argument("--minutes", type=float, default=15.0, help="how far back (default: 15)")
    parser.add_argument("--ago", type=float, default=0.0, metavar="SECONDS", help="end that long before now")
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval stands for (default: 1m)")
    parser.add_argument("--png", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    end = time.time() - options.ago
    window = (end - 60 * options.minutes, end, max(1.0, 60 * options.minutes / POINTS))
    described = json.loads(options.dashboard.read_text(encoding="utf-8"))
    with httpx.Client(base_url=options.prometheus, timeout=30) as client:
        panels = [read(panel, client, window, options.rate_interval) for panel in described["panels"]]
    empty = [panel.title for panel in panels if panel.kind != "row" and not panel.curves]
    print(f"{len(panels) - len(empty)} panels drawn; without data: {', '.join(empty) or 'none'}")
    draw(panels, described["title"], options.png)
    return int(len(empty) == sum(panel.kind != "row" for panel in panels))


def read(
    described: Mapping[str, object], client: httpx.Client, window: tuple[float, float, float], interval: str
) -> Panel:
    """Answer the queries of one panel. Raises httpx.HTTPStatusError when Prometheus refuses one."""
    panel = json.loads(json.dumps(described))  # a plain copy, so that the keys below need no casts
    defaults = panel.get("fieldConfig", {}).get("defaults", {})
    grid = panel["gridPos"]
    curves = [
        curve
        for target in panel.get("targets", ())
        for curve in query(client, expand(target["expr"], interval), target["legendFormat"], window)
    ]
    return Panel(
        title=panel["title"],
        kind=panel["type"],
        place=(grid["x"], grid["y"], grid["w"], grid["h"]),
        unit=defaults.get("unit", "none"),
        stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
        limits=(defaults.get("min"), defaults.get("max")),
        steps=tuple((step["value"], step["color"]) for step in defaults.get("thresholds", {}).get("steps", ())),
        curves=tuple(curves),
    )


def expand(expression: str, interval: str) -> str:
    """A query with Grafana's variables replaced: every model, every instance."""
    timed = expression.replace("$__rate_interval", interval).replace("$__range", interval)
    return re.sub(r"\$(model_name|instance)\b", ".*", timed)


def query(client: httpx.Client, expression: str, legend: str, window: tuple[float, float, float]) -> list[Curve]:
    """The series of a range query that have any value."""
    start, end, step = window
    form = {"query": expression, "start": str(start), "end": str(end), "step": str(step)}
    answer = client.post("/api/v1/query_range", data=form)
    answer.raise_for_status()
    curves = []
    for series in answer.json()["data"]["result"]:
        name = legend
        for label in set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend)):
            name = re.sub(rf"\{{\{{\s*{label}\s*\}}\}}", str(series["metric"].get(label, "")), name)
        values = [float(value) for _, value in series["values"]]
        if any(value == value for value in values):
            curves.append(Curve(name, [float(at) for at, _ in series["values"]], values))
    return curves


if __name__ == "__main__":
    sys.exit(main())
