"""The task `worksheet`: generator and checker agree, and nothing wrong passes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import pytest

from training.tasks import atlas, exercises, files, worksheet
from training.tasks.loading import load


def test_the_checker_agrees_with_every_reference() -> None:
    """The checker reads question and answer afresh, so generator and checker test each other."""
    for item in islice(worksheet.items(3), 2000):
        assert worksheet.score(item.reference, item) == 1.0, item


def test_one_changed_result_is_one_wrong_part() -> None:
    random = Random(4)
    for item in islice(worksheet.items(5), 500):
        lines = item.reference.splitlines()
        row = random.randrange(len(lines))
        lines[row] = _spoiled(lines[row], random)
        expected = (len(lines) - 1) / len(lines)
        assert worksheet.score("\n".join(lines), item) == pytest.approx(expected), (item, lines[row])


def _spoiled(line: str, random: Random) -> str:
    """A line whose result is another one."""
    if value := next((word for word in line.rstrip(".").split() if word in atlas.VALUES), ""):
        other = random.choice(sorted(atlas.VALUES - {value}))
        return line.replace(f" {value}", f" {other}")
    digit = line[-2]
    return f"{line[:-2]}{(int(digit) + random.randint(1, 9)) % 10}."


def test_lines_that_are_missing_doubled_or_under_another_letter_are_wrong() -> None:
    item = next(item for item in worksheet.items(6) if item.reference.count("\n") == 3)
    lines = item.reference.splitlines()
    assert worksheet.score("\n".join(lines[1:]), item) == 0.75
    assert worksheet.score("\n".join([*lines, lines[0]]), item) == 0.75
    assert worksheet.score("\n".join(line.replace("a)", "h)") for line in lines), item) == 0.75
    assert worksheet.score("", item) == 0.0


def test_a_task_file_holds_what_it_was_written_from(tmp_path: Path) -> None:
    """Sheets that are written as JSON lines come back with their scores."""
    sheets = list(islice(worksheet.items(9), 20))
    files.write(tmp_path / "sheets.jsonl", sheets)
    assert files.read(tmp_path / "sheets.jsonl") == sheets
    task = load(str(tmp_path / "sheets.jsonl"), "worksheet")
    assert all(task.score(item.reference, item) == 1.0 for item in task.items("test", 3))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("add 47 and 85", "132"),
        ("take 285 from 632", "347"),
        ("multiply 34 by 7", "238"),
        ("add up 4 8 1", "13"),
        ("please reverse 3 8 1 5", "5 1 8 3"),
        ("sort 9 0 9 4", "0 4 9 9"),
        ("maximum of 12 98 34", "98"),
        ("Arlen: capital?", atlas.TABLE["capital", "Arlen"]),
    ],
)
def test_questions_have_their_results(question: str, expected: str) -> None:
    assert exercises.solve(question) == expected


def test_worked_steps_add_up() -> None:
    """Each step `x+y=z`, `x-y=z`, `x*y=z` of a reference is true."""
    for item in islice(worksheet.items(8), 300):
        for step in item.reference.replace(",", " ").split():
            left, equals, right = step.partition("=")
            if equals:
                assert eval(left) == int(right), item
