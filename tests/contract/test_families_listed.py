"""README.md names the families that other tests prove, and those proved to be refused: no more, no less."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families import FAMILIES, TABLE
from tests.refused import GROUPS

README = Path(__file__).parents[2] / "README.md"


def tables() -> list[dict[str, set[str]]]:
    """The tables of the section: first column -> what stands in backticks in the second."""
    section = README.read_text(encoding="utf-8").split("\n## Model families\n")[1].split("\n## ")[0]
    found: list[dict[str, set[str]]] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|") or set(line) <= set("|- "):
            continue
        if cells[1] == "`model_type`":
            found.append({})
        else:
            assert cells[0] not in found[-1], cells[0]
            found[-1][cells[0]] = set(re.findall(r"`([a-z0-9_.-]+)`", cells[1]))
    return found


def test_served_families_are_the_proved_ones() -> None:
    assert tables()[0] == {group: {row.model_type for row in rows} for group, rows in TABLE.items()}
    count = len({row.model_type for row in FAMILIES})
    assert count >= 60
    assert re.findall(r"(\d+) decoder families", README.read_text(encoding="utf-8")) == [str(count)] * 2


def test_refused_families_are_the_proved_ones() -> None:
    assert tables()[1] == {
        group: {row.model_type for row, _ in rows if not row.variant} for group, rows in GROUPS.items()
    }


def test_rows_have_names_of_their_own() -> None:
    names = [str(row) for row in FAMILIES]
    assert len(set(names)) == len(names)
