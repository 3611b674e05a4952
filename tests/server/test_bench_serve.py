"""`slipstream bench serve` against a server that streams what a script says, over real sockets on the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import client, serve
from benchmarks.client import Server
from benchmarks.null_server import Body, NullServer, Reply
from benchmarks.serve_load import Outcome, Sender, closed_loop, open_loop, until_stopped
from benchmarks.serve_measures import summarize
from benchmarks.serve_options import parse
from benchmarks.serve_prompts import Job
from benchmarks.stream import BenchmarkError

PATH = "/v1/completions"


def jobs(count: int, max_tokens: int = 4) -> list[Job]:
    body = {"model": "null", "prompt": "one two three", "max_tokens": max_tokens}
    return [Job(number, json.dumps(body).encode(), 3) for number in range(count)]


async def outcomes_of(
    server: NullServer, count: int, clients: int, *, path: str = PATH, timeout: float = 60.0
) -> Sequence[Outcome]:
    async with Server("null", server.url) as target:
        sender = Sender(target, path, timeout)
        await closed_loop(sender, jobs(count), clients, None)
    return sorted(sender.outcomes, key=lambda outcome: outcome.number)


def scripted(*replies: Reply) -> NullServer:
    return NullServer(lambda number, _body: replies[number % len(replies)])


# ---- one request -------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
@pytest.mark.parametrize("piece", [0, 1, 5])
async def test_tokens_are_the_servers_and_text_survives_any_cut(path: str, piece: int) -> None:
    reply = Reply(tokens=3, text="é🙂", piece=piece, preamble=b": keep-alive\r\n\r\n:\n\n")
    async with scripted(reply) as server:
        (outcome,) = await outcomes_of(server, 1, 1, path=path)
    assert outcome.kind == "ok" and outcome.timing is not None and not outcome.counted
    assert [chunk.text for chunk in outcome.timing.chunks] == ["é🙂"] * 3
    assert (outcome.timing.prompt_tokens, outcome.timing.completion_tokens) == (3, 3)
    assert len(outcome.timing.gaps) == 2
    assert [asked for asked, _ in server.asked] == [path]


@pytest.mark.asyncio
async def test_without_usage_chunks_are_counted_and_it_is_said() -> None:
    async with scripted(Reply(usage=False)) as server:
        (outcome,) = await outcomes_of(server, 1, 1)
    assert outcome.counted and outcome.timing is not None
    assert (outcome.timing.prompt_tokens, outcome.timing.completion_tokens) == (3, 4)


@pytest.mark.asyncio
async def test_the_first_token_is_when_the_server_lets_it_go() -> None:
    gate = asyncio.Event()
    async with scripted(Reply(gate=gate)) as server, Server("null", server.url) as target:
        sender = Sender(target, PATH, 60.0)
        task = asyncio.ensure_future(sender.send(jobs(1)[0]))
        while not server.asked:
            await asyncio.sleep(0)
        assert (sender.in_flight, sender.chunks) == (1, 0)
        opened = time.monotonic()
        gate.set()
        await task
    (outcome,) = sender.outcomes
    assert outcome.timing is not None and sender.chunks == 4
    times = [outcome.sent, opened, *(chunk.at for chunk in outcome.timing.chunks), outcome.ended]
    assert times == sorted(times)
    assert outcome.timing.first_token >= opened - outcome.sent


# ---- faults ------------------------------------------------------------------------------------------------

FAULTS = {
    "http_503": Reply(status=503),
    "http_429": Reply(status=429),
    "cut": Reply(cut_after=2),
    "error_event": Reply(error_after=1),
    "malformed": Reply(preamble=b"data: {]\n\n"),
}


@pytest.mark.asyncio
async def test_every_fault_is_counted_by_its_kind_and_hides_no_good_answer() -> None:
    replies = [Reply(), *FAULTS.values(), Reply(cut_after=0), Reply(done=False, finish=False), Reply(done=False)]
    async with scripted(*replies) as server:
        found = await outcomes_of(server, len(replies), 1)
    assert [outcome.kind for outcome in found] == ["ok", *FAULTS, "cut", "cut", "ok"]
    assert all((outcome.timing is None) == bool(outcome.message) for outcome in found)
    summary = summarize(found, {})
    assert (summary.succeeded, sum(summary.failed.values()), summary.failed["cut"]) == (2, 7, 3)
    assert summary.output_tokens == 8


@pytest.mark.asyncio
@pytest.mark.parametrize(("whole", "silence"), [(0.05, 60.0), (60.0, 0.05)])
async def test_an_answer_that_never_comes_is_a_timeout(
    whole: float, silence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "READ_SECONDS", silence)
    async with scripted(Reply(gate=asyncio.Event())) as server:
        (outcome,) = await outcomes_of(server, 1, 1, timeout=whole)
    assert (outcome.kind, outcome.timing) == ("timeout", None)


@pytest.mark.asyncio
async def test_nobody_there_is_no_connection() -> None:
    with socket.socket() as bound:  # bound, but it does not listen
        bound.bind(("127.0.0.1", 0))
        async with Server("null", f"http://127.0.0.1:{bound.getsockname()[1]}", model="m") as target:
            sender = Sender(target, PATH, 60.0)
            await sender.send(jobs(1)[0])
    assert sender.outcomes[0].kind == "connect"


# ---- loads -------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_as_many_clients_as_asked_for_are_in_flight_at_once() -> None:
    gate = asyncio.Event()

    def script(number: int, _body: Body) -> Reply:
        if number == 4:
            gate.set()  # nobody gets an answer before five have asked
        return Reply(gate=gate)

    async with NullServer(script) as server:
        found = await outcomes_of(server, 12, 5)
    summary = summarize(found, {})
    assert (summary.succeeded, summary.peak_in_flight) == (12, 5)
    assert len(server.asked) == 12


@pytest.mark.asyncio
async def test_a_connection_is_used_again_until_it_is_to_be_forgotten() -> None:
    async with NullServer() as server, Server("null", server.url) as target:
        for _ in range(3):
            await target.complete("one two", 2)
        assert server.opened == 1
        await target.forget_connections()
        await target.complete("one two", 2)
        assert server.opened == 2


@pytest.mark.asyncio
async def test_no_request_is_sent_after_the_duration() -> None:
    async with NullServer() as server, Server("null", server.url) as target:
        sender = Sender(target, PATH, 60.0)
        await closed_loop(sender, jobs(5), 2, 0.0)
    assert sender.outcomes == [] and server.asked == []


@pytest.mark.asyncio
async def test_the_timetable_sends_however_many_still_run() -> None:
    gate = asyncio.Event()

    def script(number: int, _body: Body) -> Reply:
        if number == 5:
            gate.set()
        return Reply(gate=gate)

    times = [0.0, 0.0, 0.01, 0.01, 0.02, 0.03]
    async with NullServer(script) as server, Server("null", server.url) as target:
        sender = Sender(target, PATH, 60.0)
        began = time.monotonic()
        await open_loop(sender, jobs(6), times)
    found = sorted(sender.outcomes, key=lambda outcome: outcome.number)
    assert [outcome.kind for outcome in found] == ["ok"] * 6
    planned = [outcome.planned for outcome in found if outcome.planned is not None]
    assert [at - planned[0] for at in planned] == pytest.approx(times) and planned[0] >= began
    assert all(outcome.sent >= at for outcome, at in zip(found, planned, strict=True))
    assert summarize(found, {}).peak_in_flight == 6


@pytest.mark.asyncio
async def test_an_interrupt_keeps_what_was_answered_and_names_what_was_not() -> None:
    stop, never = asyncio.Event(), asyncio.Event()

    def script(number: int, _body: Body) -> Reply:
        if number == 4:
            stop.set()
        return Reply() if number < 2 else Reply(gate=never)

    async with NullServer(script) as server, Server("null", server.url) as target:
        sender = Sender(target, PATH, 60.0)
        assert not await until_stopped(closed_loop(sender, jobs(9), 3, None), stop)
        assert sender.in_flight == 0
    assert sorted(outcome.kind for outcome in sender.outcomes) == ["interrupted"] * 3 + ["ok"] * 2


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_idle_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "IDLE_SECONDS", 0.0)
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "k3y-of-the-environment")


SHORT = ("--input-len", "5-9", "--output-len", "3", "--seed", "1", "--warmup", "1")


@pytest.mark.asyncio
async def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    counter = iter(range(0, 1000, 30))

    def metrics() -> str:
        drafts = next(counter)
        return f"vllm:spec_decode_num_drafts_total {drafts}\nvllm:spec_decode_num_draft_tokens_total {4 * drafts}\n"

    options = ("--concurrency", "1,3", "--num-requests", "6", "--goodput", "ttft:60000", "--details")
    async with NullServer(lambda n, _b: Reply(status=500) if n == 4 else Reply(), metrics=metrics) as server:
        parsed = parse(["--url", server.url, *SHORT, *options, "--output", str(file)])
        assert await serve.run(parsed, {"command": ["x"]}) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # no progress bar where nobody looks
    head, _, *rows = shown.out.splitlines()
    cells = {title: figures for title, *figures in (re.split("  +", row) for row in rows)}
    assert head.split() == ["1", "at", "once", "3", "at", "once"]
    assert cells["requests answered"] == ["5", "6"] and cells["requests failed: http_500"] == ["1", "0"]
    assert cells["most requests in flight"][0] == "1"
    assert cells["tokens per draft round, with the bonus"] == ["1.00", "1.00"]
    assert "1 x http_500: HTTP 500" in shown.out
    record = json.loads(file.read_bytes())
    first, second = (point["summary"] for point in record["points"])
    assert (first["output_tokens"], second["output_tokens"], second["peak_in_flight"]) == (15, 18, 3)
    assert first["goodput"] == pytest.approx(first["request_rate"])
    assert record["points"][0]["speculation"]["drafts"] == 30
    assert [len(r["itl_ms"]) for r in record["points"][1]["requests"]] == [2] * 6
    prompts = {str(body["prompt"]) for _, body in server.asked}
    assert len(prompts) == len(server.asked) == 1 + 12
    assert all(b"authorization: bearer k3y-of-the-environment" in head.lower() for head in server.headers)
    assert b"k3y" not in file.read_bytes()


@pytest.mark.asyncio
async def test_prompts_are_exact_or_said_to_be_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    for tokenizes in (True, False):
        async with NullServer(tokenizes=tokenizes) as server:
            parsed = parse(["--url", server.url, "--input-len", "40", "--num-requests", "3", "--output-len", "1"])
            assert await serve.run(parsed, {}) == 0
        exact = {len(str(body["prompt"]).split()) for _, body in server.asked} == {40}
        assert exact == tokenizes == ("estimated" not in capsys.readouterr().out)


@pytest.mark.asyncio
async def test_a_rate_and_a_duration_send_what_the_timetable_holds() -> None:
    async with NullServer() as server:
        parsed = parse(["--url", server.url, *SHORT, "--request-rate", "400", "--duration", "0.1", "--warmup", "0"])
        assert await serve.run(parsed, {}) == 0
        assert len(server.asked) == len(serve.timetable(400, 1.0, 1, None, 0.1)) > 0
        never = parse(["--url", server.url, *SHORT, "--request-rate", "0.001", "--duration", "0.1"])
        with pytest.raises(BenchmarkError, match="--duration"):
            await serve.run(never, {})


@pytest.mark.asyncio
async def test_a_failed_warm_up_ends_it_with_the_reason() -> None:
    async with scripted(Reply(status=404)) as server:
        with pytest.raises(BenchmarkError, match=r"warm-up failed \(http_404\).*not today"):
            await serve.run(parse(["--url", server.url, *SHORT]), {})


@pytest.mark.asyncio
async def test_nothing_answered_is_a_failure() -> None:
    async with scripted(Reply(status=500)) as server:
        assert await serve.run(parse(["--url", server.url, *SHORT, "--warmup", "0", "--num-requests", "2"]), {}) == 1


@pytest.mark.asyncio
async def test_control_c_prints_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    def script(number: int, _body: Body) -> Reply:
        if number < 3:  # the warm-up and two more
            return Reply()
        os.kill(os.getpid(), signal.SIGINT)
        return Reply(gate=asyncio.Event())

    async with NullServer(script) as server:
        parsed = parse(["--url", server.url, *SHORT, "--concurrency", "1,2", "--num-requests", "9"])
        assert await serve.run(parsed, {}) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    cells = dict(re.split("  +", line) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert (cells["requests answered"], cells["requests interrupted"]) == ("2", "1")


def test_no_server_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert serve.main(["--url", f"http://127.0.0.1:{bound.getsockname()[1]}"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("slipstream bench serve: ") and shown.err.count("\n") == 1
