"""Scoring code by running it: tests that pass count, and what leaves its bounds has passed nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from training.tasks import sandbox
from training.tasks.scoring import KINDS
from training.tasks.task import Item


def test_code_is_run_with_its_tests() -> None:
    item = Item("?", tests="assert double(4) == 8")
    answer = "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nThat doubles."
    assert KINDS["code"](answer, item) == 1
    assert KINDS["code"]("def double(x):\n    return 2 * x", item) == 1
    assert KINDS["code"](answer.replace("2 * x", "3 * x"), item) == 0
    assert KINDS["code"]("no code at all", item) == 0


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",  # no test is passed by not being there
        "import os\nos._exit(0)",
        "x = bytearray(8 << 30)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "open('big', 'wb').write(b'x' * (64 << 20))",
        "import os\nassert os.environ.get('PATH') or os.environ.get('HOME')",
    ],
)
def test_a_program_that_leaves_its_bounds_has_passed_nothing(program: str) -> None:
    assert not sandbox.passes(program)


def test_an_endless_program_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "while True: pass\n"
    )
    for seconds in (1.0, 5.0, 25.0):  # on a busy machine, it may take a while until there is a child
        assert not sandbox.passes(program, seconds)
        if note.is_file() and note.read_text():
            break
    status = Path(f"/proc/{note.read_text()}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "a process it started is still running"
