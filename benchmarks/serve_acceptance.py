"""Acceptance of drafted tokens over a run, from the counters of a server's /metrics.

vLLM's names, which llama.cpp and LMDeploy have under their own prefix. The counters are the server's, not ours: other
clients' requests are in them, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LINE = re.compile(
    r"^\w+:spec_decode_num_(drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos)(?:_total)?"
    r"(?:\{(?P<labels>[^}]*)\})? +(?P<value>[-+.0-9eE]+)",
    re.MULTILINE,
)
_POSITION = re.compile(r'position="(\d+)"')

Counters = Mapping[tuple[str, int], float]  # (what, position or -1) -> count, summed over engines and models


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`length` is tokens per round, the bonus token included; `per_position` the share of rounds that got so far."""

    drafts: int
    drafted: int
    accepted: int
    per_position: tuple[float, ...]

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def length(self) -> float:
        return 1 + self.accepted / self.drafts


def read_counters(metrics: str) -> Counters:
    """The speculative counters of a Prometheus text; empty where the server does not speculate."""
    found: dict[tuple[str, int], float] = {}
    for line in _LINE.finditer(metrics):
        position = _POSITION.search(line["labels"] or "")
        key = (line[1], int(position[1]) if position and line[1].endswith("per_pos") else -1)
        found[key] = found.get(key, 0.0) + float(line["value"])
    return found


def acceptance(before: Counters, after: Counters) -> Acceptance | None:
    """What was drafted and accepted in between; None where nothing was, or where the server started anew."""
    grown = {key: round(value - before.get(key, 0.0)) for key, value in after.items()}
    drafts = grown.get(("drafts", -1), 0)
    if drafts <= 0 or min(grown.values()) < 0:
        return None
    positions = sorted(key for key in grown if key[1] >= 0)
    return Acceptance(
        drafts,
        grown.get(("draft_tokens", -1), 0),
        grown.get(("accepted_tokens", -1), 0),
        tuple(grown[key] / drafts for key in positions),
    )
