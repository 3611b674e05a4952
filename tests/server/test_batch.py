"""`slipstream run-batch` without a process: its files, its retries, and the application as what answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError
from server.batch import lines
from server.batch.command import main
from server.batch.lines import BadLine, Task
from server.batch.output import Output
from server.batch.progress import Progress
from server.batch.work import Effort, Unreachable, Work
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, COMPLETION, Json, make_app, started

pytestmark = pytest.mark.asyncio
URL = "/v1/completions"


def line(custom_id: str, body: Json | None = None, **fields: Any) -> str:
    asked = {"custom_id": custom_id, "method": "POST", "url": URL, "body": body or COMPLETION}
    return json.dumps({**asked, **fields})


def written(folder: Path, *texts: str) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def answers(path: Path) -> list[Json]:
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in found)
    assert len({one["id"] for one in found}) == len(found)
    return found


async def run(client: httpx.AsyncClient, asked: Path, told: Path, retries: int = 3) -> Progress:
    progress = Progress(lines.count(asked), io.StringIO())
    with Output(told) as output:
        await Work(client, output, progress, Effort(4, retries, pause=0.0)).run(lines.read(asked))
    return progress


def scripted(*script: int | httpx.Response | Exception) -> tuple[httpx.AsyncClient, list[str]]:
    """A client of a server that answers with these, one after the other, and the paths it was asked for."""
    left, asked = list(script), list[str]()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        step = left.pop(0)
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step, json={"n": step}) if isinstance(step, int) else step

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test/v1"), asked


async def test_every_url_and_every_kind_of_bad_line(tmp_path: Path) -> None:
    texts = (
        line("chat", CHAT, url="/v1/chat/completions"),
        line("text"),
        line("response", {"model": "tiny", "input": "hi"}, url="/v1/responses"),
        line("refused", {**COMPLETION, "prompt": ""}),
        line("other", {**COMPLETION, "model": "other"}),
        "{no json",
        "[]",
        "",
        "\ufeff{}",
        '{"custom_id": "deep", "body": ' + "[" * 200 + "]" * 200 + "}",
        line("text"),
        line("url", url="/v1/files"),
        line("method", method="GET"),
        line("body", body=None).replace(json.dumps(COMPLETION), "3"),
        line("stream", {**COMPLETION, "stream": True}),
        json.dumps({"custom_id": 3}),
        line("x" * 600),
    )
    told = tmp_path / "out.jsonl"
    async with started(make_app(FakeEngine())) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
            progress = await run(client, written(tmp_path, *texts), told)
    found = answers(told)
    by_id = {one["custom_id"]: one for one in found if one["error"] is None}
    assert {name: one["response"]["status_code"] for name, one in by_id.items()} == {
        **dict.fromkeys(("chat", "text", "response"), 200),
        **{"refused": 400, "other": 404},
    }
    assert by_id["chat"]["response"]["body"]["choices"][0]["message"]["content"] == "Hello, wörld!"
    assert by_id["response"]["response"]["body"]["object"] == "response"
    assert all(one["response"]["request_id"] for one in by_id.values())
    codes = sorted((one["error"]["code"], one["custom_id"]) for one in found if one["custom_id"] and one["error"])
    assert codes == [
        ("duplicate_custom_id", "text"),
        ("invalid_body", "body"),
        ("invalid_body", "stream"),
        ("invalid_method", "method"),
        ("invalid_url", "url"),
    ]
    nameless = sorted(one["error"]["code"] for one in found if one["custom_id"] is None)
    assert nameless == ["invalid_custom_id"] * 2 + ["invalid_json"] * 3 + ["invalid_line"]
    assert (progress.done, progress.bad, progress.total) == (3, 13, 17)


async def test_a_line_that_is_too_long_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 200)
    path = written(tmp_path, line("a"), line("b", {"prompt": "x" * 500}), line("c"))
    found = list(lines.read(path))
    assert [one.custom_id for one in found] == ["a", None, "c"]
    assert isinstance(found[1], BadLine) and found[1].code == "line_too_long"
    assert lines.count(path) == 3


async def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n" + line("b"))
    assert lines.count(path) == 2 and [isinstance(one, Task) for one in lines.read(path)] == [True, True]


@pytest.mark.parametrize(
    "script, status, sent",
    [
        ((429, 503, 200), 200, 3),
        ((502, 504, 408, 200), 200, 4),
        ((httpx.Response(503, headers={"retry-after": "0"}, json={}), 200), 200, 2),
        ((httpx.ConnectError("no"), httpx.ReadError("cut"), 200), 200, 3),
        ((429, 429, 429, 429), 429, 4),
        ((500,), 500, 1),
        ((400,), 400, 1),
        ((httpx.Response(503, headers={"x-should-retry": "false"}, json={}),), 503, 1),
    ],
    ids=str,
)
async def test_what_is_asked_again(script: Sequence[Any], status: int, sent: int, tmp_path: Path) -> None:
    client, asked = scripted(*script)
    await run(client, written(tmp_path, line("a")), tmp_path / "out.jsonl")
    (one,) = answers(tmp_path / "out.jsonl")
    assert one["response"]["status_code"] == status and asked == ["/v1/completions"] * sent


async def test_an_answer_that_is_no_json(tmp_path: Path) -> None:
    client, _ = scripted(httpx.Response(200, text="<html>"))
    progress = await run(client, written(tmp_path, line("a")), tmp_path / "out.jsonl")
    (one,) = answers(tmp_path / "out.jsonl")
    assert one["response"] is None and one["error"]["code"] == "invalid_answer" and progress.bad == 1


async def test_a_server_that_goes_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    asked, told = written(tmp_path, *(line(str(i)) for i in range(9))), tmp_path / "out.jsonl"
    gone = [httpx.ConnectError("gone")] * 40
    client, _ = scripted(200, 200, *gone)
    with pytest.raises(Unreachable, match="gone"):
        await run(client, asked, told)
    assert len(answers(told)) == 2
    client, paths = scripted(*[200] * 7)
    progress = await run(client, asked, told)
    assert sorted(one["custom_id"] for one in answers(told)) == [str(i) for i in range(9)]
    assert len(paths) == 7 and (progress.old, progress.done) == (2, 7)


GOOD = json.dumps({"id": "1", "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None})
LEFT: dict[str, Callable[[str], str]] = {
    "half a line": lambda good: good + '{"id": "2", "custom_id": "b", "resp',
    "half a line that is JSON": lambda good: good + GOOD.replace('"a"', '"b"'),
    "a failed answer": lambda good: good + GOOD.replace("200", "500").replace('"a"', '"b"') + "\n",
    "an error": lambda good: '{"custom_id": "b", "response": null, "error": {"code": "x", "message": ""}}\n' + good,
    "the same twice": lambda good: good + good,
    "garbage": lambda good: "\x00\x01\n\n{}\n[]\n" + good,
}


@pytest.mark.parametrize("left", LEFT)
async def test_only_good_lines_are_kept(left: str, tmp_path: Path) -> None:
    told = tmp_path / "out.jsonl"
    told.write_text(LEFT[left](GOOD + "\n"))
    client, asked = scripted(200)
    progress = await run(client, written(tmp_path, line("a"), line("b")), told)
    assert [text == GOOD for text in told.read_text().splitlines()] == [True, False]
    assert [one["custom_id"] for one in map(json.loads, told.read_text().splitlines())] == ["a", "b"]
    assert len(asked) == 1 and progress.old == 1
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


async def test_nothing_to_do_leaves_the_file_alone(tmp_path: Path) -> None:
    told = tmp_path / "out.jsonl"
    told.write_text(GOOD + "\n")
    before = told.stat().st_ino
    client, asked = scripted()
    await run(client, written(tmp_path, line("a")), told)
    assert told.read_text() == GOOD + "\n" and told.stat().st_ino == before and asked == []


async def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    told = tmp_path / "out.jsonl"
    told.write_text("{}\n")  # a line to drop, so that the file is replaced
    with Output(told), pytest.raises(ConfigError, match="another run"):
        Output(told)
    Output(told).close()


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--url", "x", "--draft", "ngram"), "--draft"),
        (("--url", "x", "--set", "models.0.quant=none"), "--set"),
        (("--url", "x", "demo"), "MODEL"),
        (("--api-key", "k"), "--api-key"),
        (("--concurrency", "0"), "--concurrency"),
        (("--set", "models.0.nothing=1"), "models"),
    ],
)
async def test_flags_that_do_not_go_together(flags: Sequence[str], told: str, tmp_path: Path) -> None:
    asked = written(tmp_path, line("a"))
    with pytest.raises(ConfigError, match=told):
        main([str(asked), str(tmp_path / "out.jsonl"), *flags])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_the_progress_line() -> None:
    out = Terminal()
    progress = Progress(4, out)
    progress.answered()
    progress.skipped()
    progress.failed("line 3: \x1b[31mbad")
    assert "3/4" in progress.line() and "1 failed" in progress.line() and "#" in progress.line()
    assert "\x1b[31m" not in out.getvalue() and "line 3" in out.getvalue()
    assert progress.close().startswith("1 answered, 1 failed, 1 kept from before, in ")
    assert Progress(0, io.StringIO()).line().startswith("[####")


async def test_the_two_files_are_told_apart(tmp_path: Path) -> None:
    asked = tmp_path / "in.jsonl"
    with pytest.raises(ConfigError, match="there is no such file"):
        main([str(asked), str(tmp_path / "out.jsonl")])
    asked.write_text("{}\n")
    with pytest.raises(ConfigError, match="need another file"):
        main([str(asked), str(asked)])
    assert asked.read_text() == "{}\n"
