"""docs/performance.md from the record and the words in performance_page.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

import msgspec

from benchmarks import performance_tables as tables
from benchmarks import report
from benchmarks.performance_figures import servers_of, steps_of
from benchmarks.performance_record import Part, origin
from benchmarks.performance_targets import outcomes
from benchmarks.quality_tables import quality_rows

TEMPLATE = Path(__file__).with_name("performance_page.md")
MISSING = "Not measured in this run."
_TITLES = {
    "startup": "Start and memory",
    "host": "What a step costs besides the model",
    "front": "A streamed chunk's cost in the front process",
    "overhead": "What the server adds to the engine's steps",
    "growth": "Growth",
}

PICTURES = {"growth": "![Costs over sizes](images/performance_growth.png)"}


class Printed(msgspec.Struct):
    """A part that consists of programs."""

    json: dict[str, object]
    printed: dict[str, str]
    commands: dict[str, str]
    failed: dict[str, str]


class _Quality(msgspec.Struct):
    sources: list[str]
    missing: list[str]
    positions: int
    tokens: int
    rows: dict[str, dict[str, object]]


def page(parts: Mapping[str, Part]) -> str:
    """The whole page; a part that was not measured says so in its place."""
    servers, steps = servers_of(parts), steps_of(parts)
    words = dict.fromkeys(_names(), MISSING)
    reached = outcomes(servers, steps)
    words["targets"] = report.markdown_table(tables.target_rows(reached))
    missed = tables.missed_lines(reached, servers, steps)
    words["missed"] = "\n".join(("Where the time of those that were missed goes:", "", *missed)) if missed else ""
    words["questions"] = "none were asked"
    words["left_out"] = ""
    for name in ("servers", "steps", "quality"):
        if name in parts:
            words[f"{name}_origin"] = origin(parts[name].about)
    if servers is not None:
        words["questions"] = servers.questions
        words["comparison"] = report.markdown_table(tables.comparison_rows(servers, steps))
        words["servers"] = report.markdown_table(tables.server_rows(servers))
        if servers.left_out:
            words["left_out"] = "\n".join(("Left out:", "", *tables.left_out_lines(servers)))
    if steps is not None and steps.limits:
        words["machine_limits"] = report.markdown_table(tables.machine_rows(steps.peaks))
        words["limits"] = report.markdown_table(tables.limit_rows(steps))
    if steps is not None and steps.runs:
        words["kernels"] = report.markdown_table(tables.kernel_rows(steps))
    words |= _quality(parts)
    words["others"] = _others(parts)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(words)


def _names() -> list[str]:
    return Template(TEMPLATE.read_text(encoding="utf-8")).get_identifiers()


def _quality(parts: Mapping[str, Part]) -> dict[str, str]:
    if "quality" not in parts:
        return {}
    programs = msgspec.convert(parts["quality"].found, Printed)
    if "quality" not in programs.json:
        return {"quality": "; ".join(programs.failed.values())}
    found = msgspec.convert(programs.json["quality"], _Quality)
    text = f"{found.positions:,} tokens of {', '.join(found.sources)}"
    return {
        "quality": report.markdown_table(quality_rows(found.rows)),
        "quality_text": text,
        "quality_tokens": f"{found.tokens}",
    }


def _others(parts: Mapping[str, Part]) -> str:
    """What the small programs printed, as it was."""
    told = []
    for name in ("host", "front", "growth"):
        if name not in parts:
            continue
        found = msgspec.convert(parts[name].found, Printed)
        for program, printed in found.printed.items():
            told += [f"### {_TITLES.get(program, program)}", f"`{found.commands[program]}`", f"```\n{printed}\n```"]
            if program in PICTURES:
                told.append(PICTURES[program])
        told += [f"`{program}` failed: {why}" for program, why in found.failed.items()]
        told.append(origin(parts[name].about))
    return "\n\n".join(told) or MISSING
