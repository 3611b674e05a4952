"""The benchmark client against a small server of known behaviour, and the arithmetic behind the printed tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from benchmarks import engine_steps, launch, overhead, report, serving, startup
from benchmarks.client import Server
from benchmarks.processes import MemorySampler, Process, family, listeners, parse_stat, process_table, used_by_others
from benchmarks.prompts import LENGTHS, Prompts
from benchmarks.scenarios import SCENARIOS, Values
from benchmarks.stream import BenchmarkError, Chunk, Timing, events, read_answer
from engine.types import Admission, Request, SamplingParams, SeqResult, StepOutput, StepPlan

# ---- a stream becomes a timing ---------------------------------------------------------------------------


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunk(text: str, **fields: object) -> bytes:
    return event(choices=[{"index": 0, "text": text}], **fields)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


END = event(choices=[], usage=usage(5, 3)) + b"data: [DONE]\n\n"


def test_an_event_belongs_to_the_piece_that_completes_its_line() -> None:
    pieces = [(1.0, b": hello\r\n\r\ndata: a\r\n\r\nda"), (2.0, b"ta:b"), (3.0, b"\n\ndata: c\n\nid: 4\n\n")]
    assert list(events(pieces)) == [(1.0, b"a"), (3.0, b"b"), (3.0, b"c")]


def test_a_timing_starts_at_the_first_text_and_ends_at_the_last_chunk() -> None:
    pieces = [(10.5, chunk("")), (11.0, chunk("a")), (12.0, chunk("b")), (13.0, chunk("c") + END[:9]), (14.0, END[9:])]
    timing = read_answer(10.0, pieces, 3)
    assert (timing.first_token, timing.decode_rate) == (1.0, 1.0)
    assert (timing.ended, timing.prompt_tokens, timing.completion_tokens) == (14.0, 5, 3)


def test_counts_in_the_chunks_tell_how_many_tokens_the_first_one_had() -> None:
    pieces = [(1.0, chunk("ab", usage=usage(5, 2))), (3.0, chunk("c", usage=usage(5, 3))), (3.0, END)]
    timing = read_answer(0.0, pieces, 3)
    assert [c.total for c in timing.chunks] == [2, 3]
    assert timing.decode_rate == 0.5


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        (chunk("a"), "before it was complete"),
        (b"data: [DONE]\n\n", "before it was complete"),
        (chunk("a") + b"data: [DONE]\n\n", "usage"),
        (chunk("a") + event(choices=[], usage=usage(5, 2)) + b"data: [DONE]\n\n", "asked for 3 tokens"),
        (chunk("a") + event(error={"message": "out of luck"}) + b"data: [DONE]\n\n", "out of luck"),
        (b"data: {]\n\n", "no completion chunk"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_no_measurement(stream: bytes, complaint: str) -> None:
    with pytest.raises(BenchmarkError, match=complaint):
        read_answer(0.0, [(1.0, stream)], 3)


def test_an_answer_in_one_piece_has_no_decode_rate() -> None:
    with pytest.raises(BenchmarkError, match="one piece"):
        assert read_answer(0.0, [(1.0, chunk("abc") + END)], 3).decode_rate


# ---- the whole client, over a server that answers at once --------------------------------------------------


class WordServer(httpx.AsyncBaseTransport):
    """Words are its tokens. Streams "x" as often as asked, one per chunk; notes what it was asked."""

    def __init__(self, *, tokenizer: bool = True, status: int = 200) -> None:
        self.asked: list[dict[str, object]] = []
        self._tokenizer = tokenizer
        self._status = status

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "words"}]})
        body = json.loads(await request.aread())
        if request.url.path == "/tokenize":
            tokens = list(range(len(body["prompt"].split())))
            return httpx.Response(200, json={"tokens": tokens}) if self._tokenizer else httpx.Response(404)
        assert request.url.path == "/v1/completions"
        self.asked.append(body)
        if self._status != 200:
            return httpx.Response(self._status, stream=httpx.ByteStream(event(error={"message": "not today"})))
        count, size = body["max_tokens"], len(body["prompt"].split())
        stream = chunk(" x") * count + event(choices=[], usage=usage(size, count)) + b"data: [DONE]\n\n"
        return httpx.Response(200, stream=httpx.ByteStream(stream))


@pytest.mark.asyncio
async def test_the_client_asks_for_a_greedy_stream_of_exactly_so_many_tokens() -> None:
    words = WordServer()
    async with Server("w", "http://test/v1/", words) as server:
        timing = await server.complete("one two three", 4)
    assert (timing.prompt_tokens, timing.completion_tokens, len(timing.chunks)) == (3, 4, 4)
    (asked,) = words.asked
    assert asked == {
        "model": "words",
        "prompt": "one two three",
        "max_tokens": 4,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.asyncio
async def test_a_refusal_names_the_server_and_the_reason() -> None:
    async with Server("w", "http://test", WordServer(status=503)) as server:
        with pytest.raises(BenchmarkError, match=r"^w: HTTP 503: .*not today"):
            await server.complete("text", 1)


@pytest.mark.asyncio
async def test_tokens_are_counted_by_the_first_server_that_can() -> None:
    blind = Server("blind", "http://a", WordServer(tokenizer=False))
    words = Server("words", "http://b", WordServer())
    count, name = await serving.find_counter([blind, words])
    assert (name, await count("one two")) == ("words", 2)
    assert (await serving.find_counter([blind]))[1] == ""


@pytest.mark.asyncio
async def test_every_scenario_sends_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timing, "decode_rate", 7.0)  # everything arrives at once here
    sent = {}
    for scenario in SCENARIOS:
        words = WordServer()
        async with Server("w", "http://test", words) as server:
            values = await scenario.run(server, await scenario.prompts(Prompts("a b c", count_words, 1)), 5)
        assert {metric.key for metric in scenario.metrics} <= set(values)
        sent[scenario.name] = [(len(str(body["prompt"]).split()), body["max_tokens"]) for body in words.asked]
    assert sent["single"] == [(64, 5)] * 3
    assert sorted(sent["8 clients"]) == sorted([(n, 5) for n in LENGTHS] * 4)
    assert sorted(sent["32 clients"]) == sorted([(n, 5) for n in LENGTHS] * 8)
    assert sent["prefix"][0] == (512, 2) and sent["prefix"][1][0] > 512


@pytest.mark.asyncio
async def test_rounds_give_all_servers_the_same_prompts_and_change_the_order() -> None:
    transports = [WordServer(), WordServer()]
    order: list[str] = []

    async def run(server: Server, prompts: object, tokens: int) -> Values:
        order.append(server.name)
        for prompt in prompts if isinstance(prompts, list) else []:
            await server.complete(prompt, tokens)
        return {"output": 1.0, "prompt_tokens": 1.0}

    scenario = serving.Scenario("two", SCENARIOS[1].metrics, lambda prompts: prompts.mixed(2), run)
    servers = [Server(name, "http://elsewhere", t) for name, t in zip("ab", transports, strict=True)]
    for server in servers:
        await server.__aenter__()
    found = await serving.measure(servers, [scenario], Prompts("a b c", count_words, 1), 2, 4)
    assert "".join(order) == "abbaab"
    assert [(m.server, m.round) for m in found] == [("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    first, second = ([body["prompt"] for body in t.asked] for t in transports)
    assert first == second and len(set(first)) == 6


# ---- prompts ---------------------------------------------------------------------------------------------


async def count_words(text: str) -> int:
    return len(text.split())


async def count_pairs(text: str) -> int:
    """A token for every two letters of a word: most words have more than one."""
    return sum((len(word) + 1) // 2 for word in text.split())


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [count_words, count_pairs])
async def test_prompts_have_the_asked_length_and_no_common_start(count: Callable[[str], Awaitable[int]]) -> None:
    text = "alpha be gamma delta of epsilon"
    made = await Prompts(text, count, 7).mixed(8)
    assert [await count(prompt) for prompt in made] == list(LENGTHS) * 2
    assert len({prompt.split()[0] for prompt in made}) == 8
    assert made == await Prompts(text, count, 7).mixed(8)
    assert not set(made) & set(await Prompts(text, count, 8).mixed(8))


@pytest.mark.asyncio
async def test_a_pair_shares_its_prefix_to_a_word_border() -> None:
    first, second = await Prompts("alpha be gamma", count_words, 7).pair()
    assert second.startswith(first + " ") and await count_words(first) == 512


# ---- processes -------------------------------------------------------------------------------------------


def process(pid: int, parent: int, own: float, reaped: float = 0.0, group: int = 1, started: int = 0) -> Process:
    return Process(pid, parent, group, started, own, reaped)


def as_table(*processes: Process) -> dict[int, Process]:
    return {p.pid: p for p in processes}


def test_a_stat_line_is_read_past_any_name() -> None:
    fields = "S 4 40 400 0 -1 0 1 2 3 4 100 50 300 100 20 0 1 0 777 1 1"
    assert parse_stat(f"12 (a) b (c d) {fields}") == Process(12, 4, 400, 777, 1.5, 4.0)


def test_a_family_is_all_descendants_and_the_session() -> None:
    chain = (process(pid, pid - 1, 0.0) for pid in range(1, 6))
    table = as_table(*chain, process(6, 1, 0.0, group=2), process(7, 1, 0.0))
    assert family(table, {2}) == {2, 3, 4, 5, 6}


def test_load_counts_children_that_came_and_went_and_leaves_out_the_measured() -> None:
    before = as_table(process(1, 0, 1.0), process(2, 1, 5.0), process(3, 1, 2.0))
    after = as_table(process(1, 0, 1.0, reaped=2.0 + 0.5 + 0.25), process(2, 1, 50.0), process(4, 1, 0.125))
    # 3 used 0.5 more and ended, another child lived for 0.25 s in between, 4 is new
    assert used_by_others(before, after, {2}) == 0.875


def test_an_end_that_nobody_waits_for_hides_no_load() -> None:
    before = as_table(process(1, 0, 1.0), process(3, 1, 100.0))
    assert used_by_others(before, as_table(process(1, 0, 1.5)), ()) == 0.5


def test_a_reused_pid_is_another_process() -> None:
    before = as_table(process(3, 1, 100.0, started=5))
    assert used_by_others(before, as_table(process(3, 1, 1.0, started=9)), ()) == 1.0


def test_the_memory_of_a_real_tree_is_seen() -> None:
    """A child of a child holds 40 MB and says so; both figures must hold it."""
    inner = "data = bytes([1]) * 40_000_000; print('held', flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        sampler = MemorySampler(child.pid)
        sampler.stop()
        assert child.pid in process_table()
        child.communicate("\n")
    assert 40e6 < sampler.peak <= sampler.upper_bound < 200e6


def test_a_server_elsewhere_has_no_local_process() -> None:
    assert listeners("http://192.0.2.1:8000") == set()


# ---- the engine's side of the overhead ---------------------------------------------------------------------


def request(name: str, prompt: tuple[int, ...]) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=4))


def test_steps_travel_through_the_log_under_the_key_of_their_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Done:
        def result(self) -> StepOutput:
            return StepOutput(1, (SeqResult("a", (9, 9), 4), SeqResult("b", (), 2)))

    recorder = engine_steps.StepRecorder()
    recorder.plan(StepPlan(0, (), admitted=tuple(Admission(request(n, (1, 2)), ()) for n in "ab")))
    with caplog.at_level("INFO", logger=engine_steps.__name__):
        engine_steps.TimedHandle(Done(), recorder).result()
    log = tmp_path / "log"
    log.write_text(f"noise\nINFO engine: {caplog.messages[0]}\nmore noise\n")
    (step,) = engine_steps.read_steps(log, 0.0)
    assert (step.fed, step.tokens) == (2, [(engine_steps.prompt_key([1, 2]), 2)])
    assert engine_steps.read_steps(log, step.at + 1) == []


def test_only_neighbouring_steps_that_decode_every_stream_are_compared() -> None:
    both = [("a", 1), ("b", 1)]
    times = [(0.0, 2, both[:1]), (1.0, 2, both), (2.5, 2, both), (3.0, 1, both[:1]), (4.0, 2, both)]
    steps = [engine_steps.Step(at, fed, tokens) for at, fed, tokens in times]
    assert engine_steps.full_steps(steps, 2) == [1.5]


def test_a_chunk_is_matched_to_the_step_that_made_its_last_token() -> None:
    steps = [engine_steps.Step(at, 1, [("a", n)]) for at, n in ((1.0, 1), (2.0, 2), (3.0, 1))]
    chunks = (Chunk(0.5, "", 0), Chunk(1.25, "x", 1), Chunk(2.5, "y", 2), Chunk(3.125, "zz", 4))
    timing = Timing(0.0, 4.0, chunks, 1, 4)
    assert overhead.deliveries({"a": timing}, steps) == [0.25, 0.5, 0.125]
    with pytest.raises(BenchmarkError, match="token 4, the engine made 3"):
        overhead.deliveries({"a": timing}, steps[:2])
    with pytest.raises(BenchmarkError, match="count of tokens"):
        overhead.deliveries({"a": Timing(0.0, 1.0, (Chunk(1.0, "x"),), 1, 1)}, steps)


# ---- tables ----------------------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_seen() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [report.percentile(values, p) for p in (0, 20, 21, 50, 99, 100)] == [1.0, 1.0, 2.0, 3.0, 5.0, 5.0]


def test_numbers_are_shown_as_precisely_as_they_are() -> None:
    assert report.spread([26.96, 25.04, 177.4]) == "27.0 (25.0-177)"
    assert (report.spread([1.234]), report.spread([])) == ("1.23", "-")


def test_the_table_compares_within_rounds() -> None:
    found = [
        serving.Measurement("8 clients", name, number, {"output": value, "prompt_tokens": 100.0}, 0.05)
        for name, values in {"us": (20.0, 80.0, 30.0), "peer": (10.0, 20.0, 30.0)}.items()
        for number, value in enumerate(values)
    ]
    scenario = next(s for s in SCENARIOS if s.name == "8 clients")
    text = report.table(serving.speed_table(found, [scenario], ["us", "peer"]))
    cells = [part.strip() for part in text.splitlines()[2].split("  ") if part.strip()]
    assert cells == ["8 clients, tok/s", "30.0 (20.0-80.0)", "20.0 (10.0-30.0)", "2.00 (1.00-4.00)"]
    assert report.paired_ratios([2.0], [6.0], higher_is_better=False) == [3.0]
    assert serving.uneven_prompts(found) == []
    other = serving.Measurement("8 clients", "other", 1, {"output": 1.0, "prompt_tokens": 99.0}, 0.0)
    assert len(serving.uneven_prompts([*found, other])) == 1


def test_a_command_is_everything_after_the_first_dashes() -> None:
    assert startup.split_command(["--runs", "2", "--", "x", "--", "{port}"]) == (["--runs", "2"], ["x", "--", "{port}"])
    assert launch.fill_in_port(["serve", "--port={port}"], 81) == ["serve", "--port=81"]
    with pytest.raises(BenchmarkError, match="port"):
        launch.fill_in_port(["serve"], 81)
