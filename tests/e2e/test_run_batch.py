"""`slipstream run-batch` as users run it: with an engine of its own, killed in the middle, and against a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.e2e.process import COMMAND, ROOT, ServerProcess, children, run_command, wait_until
from tests.e2e.wire import assert_idle, complete

Json = dict[str, Any]
LINES = 18


def request(i: int) -> Json:
    """Of one of the three kinds, all of them greedy."""
    kinds: list[tuple[str, Json]] = [
        ("/v1/completions", {"prompt": f"{i}, {i + 1}, {i + 2},", "max_tokens": 12}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"Say {i}."}], "max_tokens": 12}),
        ("/v1/responses", {"input": f"What is {i}?", "max_output_tokens": 12}),
    ]
    url, body = kinds[i % 3]
    return {"custom_id": f"r{i}", "method": "POST", "url": url, "body": {"temperature": 0, **body}}


def written(path: Path, count: int) -> Path:
    path.write_text("".join(f"{json.dumps(request(i))}\n" for i in range(count)))
    return path


def answers(path: Path) -> dict[str, Json]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    asked, told = written(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    arguments = ("run-batch", str(asked), str(told), "demo", "--concurrency", "2")
    with tempfile.TemporaryFile() as log:
        first = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: told.exists() and told.read_bytes().count(b"\n") >= 3, "three answers", 90)
        finally:
            engines = children(first.pid)
            first.send_signal(signal.SIGKILL)
            first.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in engines), "the end of its engine")
    with told.open("ab") as file:
        file.write(b'{"id": "batch_req_x", "custom_id": "r17", "resp')  # as if it had died in a write
    before = told.read_text().splitlines()[:-1]
    assert 3 <= len(before) < LINES

    second = run_command(*arguments, seconds=180)
    assert second.returncode == 0, second.stderr
    assert f"{LINES - len(before)} answered, 0 failed, {len(before)} kept from before" in second.stderr
    assert told.read_text().splitlines()[: len(before)] == before
    found = answers(told)
    assert sorted(found) == sorted(f"r{i}" for i in range(LINES))
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in found.values())
    assert found["r0"]["response"]["body"]["choices"][0]["text"]
    assert found["r1"]["response"]["body"]["choices"][0]["message"]["content"]
    assert found["r2"]["response"]["body"]["output"][0]["content"][0]["text"]


def test_against_a_running_server(demo: ServerProcess, tmp_path: Path) -> None:
    asked, told = written(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl"
    with asked.open("a") as file:
        file.write("{bad\n")
        embedded = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": ["a", "b"]}}
        file.write(f"{json.dumps(embedded)}\n")
    ended = run_command("run-batch", str(asked), str(told), "--url", demo.url)
    assert ended.returncode == 1 and "7 answered, 1 failed" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    found = {one["custom_id"]: one["response"] for one in map(json.loads, told.read_text().splitlines())}
    assert found["r0"]["body"]["choices"][0]["text"] == complete(demo.url, "0, 1, 2,", max_tokens=12)
    assert [len(vector["embedding"]) > 0 for vector in found["e"]["body"]["data"]] == [True, True]
    assert_idle(demo.url)


def test_what_users_get_wrong(tmp_path: Path) -> None:
    asked, told = written(tmp_path / "in.jsonl", 1), str(tmp_path / "out.jsonl")
    nobody = run_command("run-batch", str(asked), told, "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 1 and "no server answers" in nobody.stderr
    missing = run_command("run-batch", str(tmp_path / "none"), told)
    assert missing.returncode == 2 and "there is no such file of requests" in missing.stderr
    both = run_command("run-batch", str(asked), told, "demo", "--url", "http://127.0.0.1:9")
    assert both.returncode == 2 and "--url" in both.stderr and "MODEL" in both.stderr
    nowhere = run_command("run-batch", str(asked), str(tmp_path / "no" / "out.jsonl"))
    assert nowhere.returncode == 1 and "No such file" in nowhere.stderr
    for ended in (nobody, missing, both, nowhere):
        assert "Traceback" not in ended.stderr and os.linesep in ended.stderr
