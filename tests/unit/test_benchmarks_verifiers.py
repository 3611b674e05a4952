"""`bench verifiers` without a model: command line, variants, arithmetic of answers, intervals, tables."""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import replace

import pytest

from benchmarks import verifiers_report
from benchmarks.drafts_engine import Answer, Run
from benchmarks.drafts_figures import Round
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_engine import Speed, rate, sample
from benchmarks.verifiers_figures import MEASURES, Bootstrap, Estimate, Sample, changes, estimates, histogram
from benchmarks.verifiers_options import Options, parse, public
from benchmarks.verifiers_report import Found
from benchmarks.verifiers_task import Ending, Group, Question, task
from benchmarks.verifiers_variants import STRICT, Variant, Wish, offered, variants, wish
from engine.errors import ConfigError
from engine.types import EngineStats, ModelInfo, Request, SamplingParams, SeqUpdate, SpeculationParams, TokenLogprob
from engine.verification import Knob, VerifierCard
from tests.unit.demo_tokenizer import demo_tokenizer
from training.tasks import loading as tasks

WEIGHT = Knob("target_weight", 0.7, 0.0, 1.0, "", neutral=1.0)
COUNT, GAP = Knob("relaxed_topk", 8, 1, 1000, "", whole=True), Knob("relaxed_delta", 0.5, 0.0, 100.0, "")
CARDS = (
    VerifierCard("strict", True, "", exact=True),
    VerifierCard("block", True, "", drawn=True),
    VerifierCard("ensemble", False, "", (WEIGHT,), drawn=True),
    VerifierCard("top_k_gap", False, "", (COUNT, GAP)),
)
INFO = ModelInfo(
    *("m", "m", 512, 100, (), 16, 64, 0, "", "speculative", "dflash", "d", 7), verifier="strict", verifiers=CARDS
)


# ---- the command line and the variants ---------------------------------------------------------------------


def test_a_word_names_a_verifier_a_knob_and_values() -> None:
    assert wish("strict") == Wish("strict")
    assert wish("ensemble=.9,.7+drawn") == Wish("ensemble", "", (0.9, 0.7), True)
    assert wish("top_k_gap:relaxed_delta=2") == Wish("top_k_gap", "relaxed_delta", (2.0,))
    for wrong in ("", "=.5", "ensemble=", "ensemble=a", "ensemble+chosen", "ensemble:=.5", "ensemble=.5,"):
        with pytest.raises(argparse.ArgumentTypeError):
            wish(wrong)


def test_variants_are_settled_as_requests_are() -> None:
    words = (
        "ensemble=.9,.5",
        "ensemble=.9+drawn",
        "top_k_gap:relaxed_delta=2",
        "top_k_gap=4",
        "block+drawn",
        "ensemble",
    )
    found = {one.name: one for one in variants(map(wish, (*words, "ensemble=.9")), INFO)}
    names = ["strict", "ensemble 0.9", "ensemble 0.5", "ensemble 0.9 drawn", "top_k_gap relaxed_delta 2", "top_k_gap 4"]
    assert list(found) == [*names, "block drawn", "ensemble"], "strict first, nothing twice"
    assert [dict(one.wish.knobs) for one in list(found.values())[1:]] == [
        {"target_weight": 0.9},
        {"target_weight": 0.5},
        {"target_weight": 0.9},
        {"relaxed_topk": 8, "relaxed_delta": 2.0},
        {"relaxed_topk": 4, "relaxed_delta": 0.5},
        {},
        {"target_weight": 0.7},
    ]
    assert [one.value for one in found.values()] == [None, 0.9, 0.5, 0.9, 2.0, 4.0, None, None]
    assert found["ensemble 0.9"].wish.bias_bound == pytest.approx(0.1)
    assert [name for name, one in found.items() if one.drawn] == ["ensemble 0.9 drawn", "block drawn"]
    greedy = [name for name, one in found.items() if one.at(0.0)]
    assert greedy == ["strict", "ensemble 0.9", "ensemble 0.5", "top_k_gap relaxed_delta 2", "top_k_gap 4", "ensemble"]
    assert all(one.at(0.5) for one in found.values())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("diversed=.5", "diversed.*not offered"),
        ("ensemble=1.5", "target_weight must be a number between 0 and 1"),
        ("ensemble:epsilon=.5", "epsilon is no knob"),
        ("strict=.5", "strict"),
        ("top_k_gap=2.5", "relaxed_topk must be an integer"),
        ("top_k_gap+drawn", "sample"),
    ],
)
def test_what_can_not_be_asked_of_a_model_is_told(word: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        variants([wish(word)], INFO)


def test_defaults_that_a_model_does_not_offer_are_left_out() -> None:
    wishes, missing = offered(map(wish, ("ensemble=.5", "diversed=.5", "diversed=0")), INFO)
    assert [one.name for one in wishes] == ["ensemble"] and missing == ["diversed"]


def options(words: str) -> Options:
    return parse(words.split())


def test_the_command_line() -> None:
    plain = options("")
    assert (plain.model, plain.temperatures, plain.batches) == ("demo", (0.0, 1.0), (1, 8)) and not plain.chosen
    assert plain.sources == ("gsm8k", "humaneval", "mtbench") and plain.speed == "adaptive"
    words = (
        "m --draft d --task fill --temperature .7 --temperature 0 --verifiers ensemble=.5 strict --prompts 3 --batch 4"
    )
    given = options(words)
    assert (given.task, given.sources, given.temperatures, given.batches) == ("fill", (), (0.7, 0.0), (4,))
    assert [one.name for one in given.wishes] == ["ensemble", "strict"] and given.chosen and given.prompts == 3
    quick = options("--quick --tokens 9 --sources a.jsonl")
    assert quick.prompts < 10 and quick.tokens == 9 and quick.sources == ("a.jsonl",) and quick.temperatures == (1.0,)


@pytest.mark.parametrize(
    "words",
    ["--temperature -1", "--temperature nan", "--verifiers =1", "--batch 0", "--speed no", "--json no/such/x.json"],
)
def test_a_complaint_names_the_flag(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        options(words)
    assert left.value.code == 2 and words.split()[-1] in capsys.readouterr().err


def test_records_name_no_folders_of_this_machine() -> None:
    given = [
        "demo",
        "--draft",
        "checkpoints/d",
        "--head=/x/y/head",
        "--task",
        "/x/task.jsonl",
        "--json",
        "../out/r.json",
    ]
    told = public([*given, "--verifiers", "ensemble=.9,.5"])
    assert told == (
        "slipstream bench verifiers demo --draft checkpoints/d --head=head --task task.jsonl --json r.json"
        " --verifiers ensemble=.9,.5"
    )


# ---- answers -----------------------------------------------------------------------------------------------

REQUEST = Request("r", (1, 2), SamplingParams(max_tokens=9))


def logprobs(*values: float) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(0, value, 1 if value > -1 else 3) for value in values)


def test_what_counts_of_an_answer() -> None:
    tokenizer = demo_tokenizer()
    words = tokenizer.encode("one two three\nfour")
    stop = next(i for i, token in enumerate(words) if "\n" in tokenizer.token_text(token))
    answer = Answer(REQUEST, 0.0)
    answer.take(SeqUpdate("r", tuple(words[:1]), logprobs(-0.5)), 1.0)
    answer.take(SeqUpdate("r", tuple(words[1:]), logprobs(*[-2.0] * (len(words) - 1)), drafted=9, accepted=3), 2.0)
    answer.bias[1:] = [0.25] * (len(words) - 1)
    answer.take(SeqUpdate("r", (5, 6), logprobs(-9.0, -9.0), drafted=9, accepted=1, bias=(0.5, 0.5)), 3.0)
    assert answer.bias == [0.0, *[0.25] * (len(words) - 1), 0.5, 0.5]
    asked = Group("g", (Question("q", "?", lambda text: float(text == "one two three")),), stop=("\n",))
    ending = Ending(tokenizer, asked.stop)
    assert ending.reached(answer.tokens) and not ending.reached(words[:stop]) and not Ending(tokenizer).reached(words)
    found = sample(answer, 0, asked, ending, 50)
    assert found.tokens == tuple(words[: stop + 1]) and found.score == 1.0
    assert found.rounds == (Round(9, 3, len(words) - 1),), "the second round began after the end"
    assert found.nll == 0.5 + 2.0 * stop and found.best == 1 and found.bias == 0.25 * stop
    short = sample(answer, 0, asked, ending, 2)
    assert short.tokens == tuple(words[:2]) and short.score == 0.0 and short.bias == 0.25
    assert sample(answer, 0, replace(asked, questions=(Question("q", "?"),)), ending, 1).score is None


def test_measures_by_hand() -> None:
    one = Sample(0, (1, 2, 3, 4), (Round(3, 2, 3), Round(3, 0, 1)), nll=2.0, best=3, bias=0.4, score=1.0)
    assert MEASURES["tokens_per_round"](one) == (4, 2) and MEASURES["acceptance"](one) == (2, 6)
    assert MEASURES["bias"](one) == (0.4, 4) and MEASURES["nll"](one) == (2.0, 4) and MEASURES["score"](one) == (1.0, 1)
    assert MEASURES["target_best"](one) == (3, 4) and MEASURES["equal_tokens"](one) == (0, 0)
    beside = one.beside([1, 2, 9, 4, 5])
    assert MEASURES["equal_tokens"](beside) == (2, 5) and MEASURES["equal_answers"](beside) == (False, 1)
    same = one.beside([1, 2, 3, 4])
    assert MEASURES["equal_tokens"](same) == (4, 4) and MEASURES["equal_answers"](same) == (True, 1)
    assert not one.beside([1, 2, 3]).equal and not one.beside([1, 2, 3, 4, 5]).equal
    assert histogram([one, one]) == (2, 0, 2) and histogram([Sample(0, (1,))]) == ()


def test_a_task_is_its_held_out_part() -> None:
    found = task("fill", 4)
    assert not found.chat and found.stop == ("\n\n",) and found.scored and len(found.questions) == 4
    assert found == task("fill", 4), "the same questions each time"
    items = tasks.load("fill").items("test", 4)
    for one, item in zip(found.questions, items, strict=True):
        assert one.text == item.prompt and one.score is not None
        assert one.score(item.reference) == 1.0 and one.score("no") == 0.0
    with pytest.raises(ConfigError, match="--task nothing"):
        task("nothing", 4)


# ---- intervals ---------------------------------------------------------------------------------------------


def scores(values: list[float]) -> list[Sample]:
    return [Sample(i, (1,), score=value) for i, value in enumerate(values)]


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Of a mean of n values: value +- 1.96 s / sqrt(n), within the noise of 2000 resamples."""
    rng = random.Random(1)
    values = [rng.gauss(5.0, 2.0) for _ in range(400)]
    mean = sum(values) / 400
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / 400)
    found = Bootstrap(400).ratio(scores(values), MEASURES["score"])
    assert found.value == pytest.approx(mean)
    for side in (found.value - found.low, found.high - found.value):
        assert side == pytest.approx(1.96 * deviation / 20, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say(full: bool) -> None:
    """Of a ratio of sums: 95 % of the experiments, +- 3 sigma, and a little less for so few prompts."""
    rng, held, count = random.Random(2), 0, 300 if full else 80
    for _ in range(count):
        lengths = [rng.randint(5, 50) for _ in range(40)]
        answers = [Sample(i, (1,) * n, best=sum(rng.random() < 0.7 for _ in range(n))) for i, n in enumerate(lengths)]
        found = Bootstrap(40, resamples=400).ratio(answers, MEASURES["target_best"])
        held += found.low <= 0.7 <= found.high
    spread = 3 * math.sqrt(0.95 * 0.05 / count)
    assert 0.928 - spread <= held / count <= 0.95 + spread, held


def test_differences_are_paired_by_prompt() -> None:
    """Prompts differ by far more than verifiers do: unpaired, the difference would drown."""
    rng = random.Random(3)
    theirs = [rng.uniform(0, 100) for _ in range(50)]
    ours = [value + 1 + rng.uniform(-0.1, 0.1) for value in theirs]
    bootstrap = Bootstrap(50)
    change = bootstrap.change(scores(ours), scores(theirs), MEASURES["score"])
    assert change.value == pytest.approx(1.0, abs=0.1) and 0.9 < change.low < change.high < 1.1
    alone = bootstrap.ratio(scores(ours), MEASURES["score"])
    assert alone.high - alone.low > 10
    itself = bootstrap.change(scores(ours), scores(ours), MEASURES["score"])
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)


def test_answers_to_one_prompt_are_drawn_together() -> None:
    """Ten equal answers to each of ten prompts say no more than one: the interval does not shrink."""
    one = scores([0.0, 1.0] * 5)
    ten = [replace(answer) for answer in one for _ in range(10)]
    bootstrap = Bootstrap(10)
    assert bootstrap.ratio(ten, MEASURES["score"]) == bootstrap.ratio(one, MEASURES["score"])


def test_what_was_not_measured_is_no_number() -> None:
    found = estimates(Bootstrap(2), [Sample(0, (1, 2), nll=1.0), Sample(1, (3, 4), nll=3.0)])
    assert all(math.isnan(x) for x in (found["score"].value, found["score"].low, found["acceptance"].high))
    assert found["nll"].value == 1.0 and found["perplexity"].value == pytest.approx(math.e)
    assert found["perplexity"].low == pytest.approx(math.exp(0.5)) and found["perplexity"].high == pytest.approx(
        math.exp(1.5)
    )
    with pytest.raises(ValueError):
        Bootstrap(0)


# ---- speeds and tables -------------------------------------------------------------------------------------


def timed(first: float, last: float, rounds: list[Round]) -> Answer:
    return Answer(REQUEST, 0.0, [], rounds, first=first, last=last)


def test_speed_is_what_comes_after_the_first_step() -> None:
    both = Run((timed(1.0, 3.0, [Round(3, 2, 3)] * 2), timed(2.0, 5.0, [Round(0, 0, 1)] * 4)), 9.0, EngineStats())
    alone = Run((timed(1.0, 2.0, [Round(0, 0, 1)] * 2),), 9.0, EngineStats())
    assert rate([both, alone]) == (6 + 4 + 2) / (4.0 + 1.0)
    with pytest.raises(BenchmarkError, match="one token"):
        rate([Run((timed(1.0, 1.0, []),), 1.0, EngineStats())])


def found_of(temperature: float) -> Found:
    relaxed = Variant("ensemble 0.5", SpeculationParams(verifier="ensemble", bias_bound=0.5), 0.5, False)
    plain = Variant(STRICT, SpeculationParams(verifier=STRICT))
    group = Group("fill", tuple(Question(f"q{i}", "", float) for i in range(2)))
    strict = [Sample(i, (1, 2, 3), (Round(3, 1, 2),), nll=1.0, best=3, score=float(i)) for i in range(2)]
    other = [Sample(i, (1, 2, 4), (Round(3, 2, 3),), nll=2.0, best=2, bias=0.3, score=0.0) for i in range(2)]
    if temperature == 0:
        strict, other = ([one.beside((1, 2, 3)) for one in samples] for samples in (strict, other))
    answers = {(temperature, "fill", one.name): samples for one, samples in ((plain, strict), (relaxed, other))}
    speeds = (
        Speed(temperature, "fill", 1, STRICT, (10.0, 20.0), 2.0),
        Speed(temperature, "fill", 1, relaxed.name, (20.0, 30.0), 3.0),
    )
    return Found(tuple(verifiers_report.rows(answers, (plain, relaxed), (group,))), speeds)


def test_tables_and_record() -> None:
    ((title, table),) = verifiers_report.tables(found_of(0.7))
    assert title == "temperature 0.7, fill: 2 questions, 2 answers of each verifier"
    assert len({len(line) for line in table}) == 1
    cells = dict(zip(table[0], table[2], strict=True))
    assert cells["verifier"] == "ensemble 0.5" and cells["tokens per round"] == "3.00 (3.00 to 3.00)"
    assert cells["bias"] == "0.1000 (0.1000 to 0.1000)" and cells["score"] == "0.000 (0.000 to 0.000)"
    assert cells["less strict's"] == "-0.500 (-1.000 to 0.000)" and cells["x strict"] == "1.75 (1.50-2.00)"
    assert "equal answers, %" not in cells
    ((_, greedy),) = verifiers_report.tables(found_of(0.0))
    cells = dict(zip(greedy[0], greedy[2], strict=True))
    assert cells["equal answers, %"] == "0.0 (0.0 to 0.0)" and cells["equal tokens, %"] == "66.7 (66.7 to 66.7)"
    record = json.loads(json.dumps(verifiers_report.record(found_of(0.7))))
    assert record["answers"][1]["less_strict"]["nll"]["value"] == pytest.approx(1 / 3)
    assert record["answers"][1]["bias_bound"] == 0.5 and record["answers"][0]["equal_answers"] is None
    assert record["answers"][1]["histogram"] == [0, 0, 2]
    assert record["speeds"][1]["over_strict"]["median"] == 1.75 and "NaN" not in json.dumps(record)


def test_changes_are_told_for_every_measure() -> None:
    one = [Sample(0, (1,), nll=1.0)]
    assert set(changes(Bootstrap(1), one, one)) == set(MEASURES)
    assert changes(Bootstrap(1), one, one)["nll"] == Estimate(0.0, 0.0, 0.0)
