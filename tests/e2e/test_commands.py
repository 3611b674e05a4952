"""The commands that talk to a running server, and the start-up table with its line to paste."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

from tests.e2e.process import ServerProcess, run_command
from tests.e2e.wire import complete


def test_the_start_up_table_and_its_curl_line(demo: ServerProcess) -> None:
    header, *rows = demo.output.split("\n\n")[0].splitlines()
    assert header.split() == ["phase", "seconds", "memory"]
    names = [re.match(r"(\D+?)  +\d", row) for row in rows]
    phases = [name[1] for name in names if name is not None]
    assert len(phases) == len(rows) and phases[-2:] == ["first token", "ready"]
    assert {"checkpoint", "self-check", "KV pool"} <= set(phases)
    assert {"weights", "packed weights"} & set(phases)  # the second where an earlier start has kept them
    line = demo.output.rstrip().splitlines()[-1]
    assert line.startswith("curl ") and shutil.which("curl")
    answer = subprocess.run(
        ["bash", "-c", f"{line} -sS -w '\\n%{{http_code}}'"], capture_output=True, text=True, timeout=60
    )
    body, _, status = answer.stdout.rpartition("\n")
    assert status == "200", answer
    assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]


def test_complete_prints_the_continuation(demo: ServerProcess) -> None:
    prompt, options = "The sun rises in the east and", ("--url", demo.url, "--temperature", "0", "--max-tokens", "12")
    expected = complete(demo.url, prompt)
    done = run_command("complete", prompt, *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")
    assert run_command("complete", "-", *options, given=prompt).stdout == expected + "\n"


def test_chat_reads_lines_and_remembers(demo: ServerProcess) -> None:
    talk = "What is the capital of France?\nAnd of Italy?\n/clear\n/exit\n"
    done = run_command("chat", "--url", demo.url, "--temperature", "0", "--max-tokens", "24", given=talk)
    assert done.returncode == 0 and done.stderr == ""
    first, second, *_ = done.stdout.splitlines()
    assert "Paris" in first and "Rome" in second


def test_a_refusal_and_a_missing_server_are_one_line(demo: ServerProcess) -> None:
    long = run_command("complete", "-", "--url", demo.url, given="one " * 9000)
    assert long.returncode == 1 and "maximum context length is 8192" in long.stderr
    other = run_command("complete", "hi", "--url", demo.url, "--model", "gpt-4o")
    assert other.returncode == 1 and "'gpt-4o' does not exist" in other.stderr
    missing = run_command("complete", "hi", "--url", "http://127.0.0.1:9")
    assert missing.returncode == 1 and "slipstream serve" in missing.stderr
    for done in (long, other, missing):
        assert done.stdout == "" and done.stderr.count("\n") == 1


def test_print_config() -> None:
    done = run_command("print-config", "--config", "configs/demo.yaml", "--set", "scheduler.lag=1")
    assert done.returncode == 0 and done.stderr == ""
    assert "lag: 1" in done.stdout and "path: demo" in done.stdout
