"""`bench diffusion` without a model: command line, variants, speeds, costs, tables and records."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from benchmarks import diffusion_dual, diffusion_report, diffusion_rules
from benchmarks.diffusion_batch import Batch
from benchmarks.diffusion_confidence import Confidences
from benchmarks.diffusion_dual import ALONE, parameters
from benchmarks.diffusion_engine import Asked
from benchmarks.diffusion_figures import Paired, Sample
from benchmarks.diffusion_options import Options, parse, public
from benchmarks.diffusion_report import Found, merged, read, tables
from benchmarks.diffusion_rules import REFERENCE, Swept, compared
from benchmarks.diffusion_speed import Cached, Timed, told
from benchmarks.diffusion_variants import PLAIN, SWEEP, Variant, Wish, matching, variants, wish
from benchmarks.drafts_engine import Answer, Run
from benchmarks.drafts_figures import paired
from benchmarks.report import write_record
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_figures import Estimate
from benchmarks.verifiers_task import Group, Question
from engine.diffusion import FULL, DiffusionInfo, DiffusionParams, DiffusionSpec, RuleCard
from engine.types import EngineStats, Passes, Request, SamplingParams, SeqUpdate, TokenLogprob
from engine.verification import Knob
from tests.unit.demo_tokenizer import demo_tokenizer

KNOBS = {"threshold": "threshold", "factor": "factor", "factor_compat": "factor", "frechet": "delta"}
CARDS = (
    RuleCard("quota", "", scheduled=True),
    *(RuleCard(rule, "", (Knob(knob, 0.5, -9.0, 99.0, ""),)) for rule, knob in KNOBS.items()),
    RuleCard("dynamic", "", (Knob("threshold", 0.85, 0.0, 2.0, ""),), scheduled=True),
)
SPEC = DiffusionSpec(FULL, 9)
INFO = DiffusionInfo(SPEC, DiffusionParams(block_length=8), CARDS, caches=SPEC.caches)
BASE = DiffusionParams(cache="dual", block_length=8)


def samples(scores: list[float], forwards: list[int], tokens: int = 12) -> list[Sample]:
    return [Sample(score, tokens, count) for score, count in zip(scores, forwards, strict=True)]


def made(*words: str, canvas: int = 64) -> list[Variant]:
    return variants(map(wish, words), INFO, canvas, BASE)


# ---- the command line and the variants ---------------------------------------------------------------------


def test_a_word_names_a_rule_a_knob_and_values() -> None:
    assert wish("frechet") == Wish("frechet")
    assert wish("frechet=.25,-1") == Wish("frechet", "", (0.25, -1.0))
    assert wish("dynamic:tokens=2") == Wish("dynamic", "tokens", (2.0,))
    for wrong in ("", "=.5", "frechet=", "frechet=a", "frechet:=.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            wish(wrong)


def test_variants_are_requests_settings() -> None:
    found = {one.name: one for one in made("quota=1,4", "threshold=.9", "frechet=-1", "dynamic:tokens=2", "quota=1")}
    assert list(found) == ["quota 1", "quota 4", "threshold 0.9", "frechet -1", "dynamic tokens 2"], "nothing twice"
    assert found["quota 4"].params == replace(BASE, rule="quota", steps=16)
    assert found["frechet -1"].params == replace(BASE, rule="frechet", knobs=(("delta", -1.0),))
    assert found["dynamic tokens 2"].params.steps == 32 and found["quota 1"].params.steps == 0, "one token a step"
    assert made("quota=4", canvas=57)[0].params.steps == 16, "of whole blocks"
    assert made("threshold")[0].params.knobs == (), "the rule's own default"
    assert found["threshold 0.9"].at("none").title == "threshold 0.9, none"
    assert PLAIN in found and REFERENCE in found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("best", "offers quota"),
        ("frechet:threshold=.5", "delta"),
        ("quota:delta=1", "tokens"),
        ("quota=.5", "at least 1"),
        ("quota=65", "at most 64"),
    ],
)
def test_what_a_model_does_not_offer_is_told(word: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        made(word)


def test_the_usual_sweep_pairs_every_margin_with_a_factor() -> None:
    pairs = matching(made(*SWEEP))
    assert len(pairs) == 7
    for ours, theirs in pairs:
        assert (ours.rule, theirs.rule) == ("frechet", "factor")
        assert ours.value is not None and theirs.value is not None and ours.value == pytest.approx(1 - theirs.value)


def options(words: str) -> Options:
    return parse(words.split())


def test_the_command_line() -> None:
    plain = options("")
    assert (plain.task, plain.parts, plain.cases, plain.tokens) == (
        "worksheet",
        ("rules", "caches", "speed"),
        2000,
        256,
    )
    assert plain.batches == (1, 4, 16) and plain.clients == 16 and len(plain.words["rules"]) == len(SWEEP)
    given = options("m --tasks x.jsonl --parts dual,batch --rules quota=1 frechet --cases 3 --caches none,dual")
    assert (given.model, given.task, given.parts, given.cases) == ("m", "x.jsonl", ("dual", "batch"), 3)
    assert given.words["rules"] == (Wish("quota", "", (1.0,)), Wish("frechet")) and given.caches == ("none", "dual")
    quick = options("--quick --tokens 9")
    assert quick.parts == ("rules", "caches", "speed", "batch", "dual") and quick.cases < 20 and quick.tokens == 9


@pytest.mark.parametrize(
    "words", ["--parts all", "--rules =1", "--batch 0", "--cases 0", "--json no/such/x.json", "--draw x"]
)
def test_a_complaint_names_the_flag(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        options(words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and (words.split()[0] in said or words.split()[1] in said)


def test_records_name_no_folders_of_this_machine() -> None:
    told = public(["checkpoints/full", "--drafter=/x/y/block", "--task", "/x/t.jsonl", "--json", "../r.json"])
    assert told == "slipstream bench diffusion checkpoints/full --drafter=block --task t.jsonl --json r.json"


# ---- answers, speeds, costs --------------------------------------------------------------------------------

REQUEST = Request("r", (1, 2), SamplingParams(max_tokens=9))


def test_what_counts_of_an_answer() -> None:
    tokenizer = demo_tokenizer()
    words = tokenizer.encode("one two")
    asked = Asked(Group("g", (Question("q", "?", lambda text: float(text == "one two")),)), tokenizer, (), 9)
    answer = Answer(REQUEST, 0.0)
    scored = tuple(TokenLogprob(0, math.log(value), 1) for value in (0.5, 1.0))
    answer.take(SeqUpdate("r", tuple(words), scored, passes=Passes(1, positions=20)), 1.0)
    last = Passes(3, 2, verifies=1, remasked=4, positions=50, draft_positions=16)
    answer.take(SeqUpdate("r", passes=last), 2.0)
    assert asked.sample(0, answer) == Sample(1.0, len(words), 3, 2, 34, 16, 1, 4, 0.75)
    assert asked.first(0).group.questions == () and asked.first(1) == asked


def run(tokens: int, seconds: float, forwards: int) -> Run:
    answer = Answer(REQUEST, 0.0, [1] * tokens, passes=Passes(forwards))
    return Run((answer,), seconds, EngineStats())


def test_speeds_are_compared_within_rounds() -> None:
    plain, threshold, frechet, cached = (*made("quota=1"), *made("threshold=.9", "frechet=.25"), made("frechet=.25")[0])
    plain, cached = plain.at("none"), cached.at("prefix")
    runs = {
        plain: [run(10, 10.0, 10), run(10, 5.0, 10)],
        threshold: [run(10, 1.0, 5), run(10, 0.5, 5)],
        frechet: [run(10, 0.5, 2), run(10, 0.25, 3)],
        cached: [run(10, 2.0, 2), run(10, 1.0, 3)],
    }
    found = {(one.variant, one.cache): one for one in told(runs, plain, 4)}
    assert found["frechet 0.25", "dual"].times == paired([20, 40], [10, 20])
    assert found["frechet 0.25", "prefix"].times.median == 1, "the first rule of its own cache"
    assert found["threshold 0.9", "dual"].times_plain == paired([10, 20], [1, 2])
    assert found["frechet 0.25", "dual"].tokens_per_forward == 4 and found["quota 1", "none"].times.median == 1
    assert all(one.times_plain is None for one in told({frechet: runs[frechet]}, plain, 4))


def safetensors(folder: Path, **shapes: list[int]) -> Path:
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


def test_parameters_are_those_that_positions_are_multiplied_by(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": [50, 4], "a.q_proj.weight": [4, 4], "a.norm.weight": [4]}
    folder = safetensors(tmp_path, **tensors, **{"b.down_proj.weight": [4, 8], "lm_head.weight": [50, 4]})
    assert parameters(folder) == 16 + 32
    with pytest.raises(BenchmarkError, match="no safetensors"):
        parameters(safetensors(tmp_path / "other", **{"norm.weight": [4]}))


def dual() -> diffusion_dual.Dual:
    def answered(right: int, positions: int) -> list[Sample]:
        return [Sample(float(i < right), 10, 5, positions=positions, verifies=1, remasked=2) for i in range(40)]

    found = {
        (ALONE, "slow"): answered(32, 100),
        (ALONE, "fast"): answered(20, 50),
        ("verify exact", "x"): answered(38, 100),
        ("verify exact", "y"): answered(20, 60),
        ("verify exact", "z"): answered(20, 40),
    }
    return diffusion_dual.told(found, (1000, 0), ("m", ""))


def test_dual_diffusion_is_held_against_its_drafter_at_no_more_cost() -> None:
    points = {one.variant: one for one in dual().points}
    assert points["x"].rival == "slow" and points["x"].less is not None
    assert points["x"].less.value == pytest.approx(0.15) and points["x"].cost.value == 100_000
    assert points["y"].rival == "fast" and points["y"].less == Estimate(0, 0, 0)
    assert (points["z"].rival, points["z"].less) == ("", None) and points["slow"].rival == ""
    assert [one.variant for one in dual().better] == ["x"]
    assert points["x"].verifies == 0.2 and points["x"].remasked == 0.2


def test_a_drafter_of_its_own_costs_what_it_is() -> None:
    small = [Sample(1.0, 10, 5, positions=100)]
    both = [Sample(1.0, 10, 1, 4, positions=30, draft_positions=100)]
    found = diffusion_dual.told({(ALONE, "a"): small, ("verify trust", "b"): both}, (1000, 10), ("m", "d"))
    assert [one.cost.value for one in found.points] == [1000, 31_000]


def test_every_verify_is_tried_with_every_draft() -> None:
    arms = diffusion_dual.dual_arms(
        SimpleNamespace(),  # type: ignore[arg-type]  # an engine that nothing is asked of
        made("frechet=0,-1"),
        [wish("confidence=.5,.9"), wish("exact")],
        (2, 4),
    )
    assert [arm.series for arm in arms] == ["verify confidence 0.5", "verify confidence 0.9", "verify exact"]
    assert [one.name for one in arms[0].variants][:2] == ["frechet 0, 2 steps", "frechet -1, 2 steps"]
    params = arms[1].variants[3].params
    assert (params.verify, params.verify_threshold, params.drafter_steps) == ("confidence", 0.9, 4)
    assert arms[2].variants[0].params.verify_threshold == -1, "the server's, which exact has no use for"


# ---- tables and records ------------------------------------------------------------------------------------


def found_all() -> Found:
    chosen = made("quota=1", "threshold=.9", "factor=.75", "frechet=.25")
    lengths = {"quota 1": 12, "threshold 0.9": 6, "factor 0.75": 4, "frechet 0.25": 3}
    answered = {name: samples([1, 1, 0, 1], [count] * 4) for name, count in lengths.items()}
    answered["quota 1"] = [replace(one, confidence=i / 4) for i, one in enumerate(answered["quota 1"])]
    seen = Confidences()
    seen.take([0.5, 0.95])
    parts = tuple(compared(name, chosen, answered) for name in ("all", "unsaturated half"))
    swept = Swept(REFERENCE, parts, (seen.histogram(PLAIN),))
    plain, rival = chosen[0].at("none"), chosen[3]
    runs = {plain: [run(10, 10.0, 10)], rival: [run(10, 1.0, 5)]}
    compare = Paired({one.title: samples([1, 0], [count, count]) for one, count in ((plain, 10), (rival, 2))})
    rows = tuple(diffusion_rules.row(one, compare, rival.title, one.title) for one in (plain, rival))
    cached, timed = Cached(rival.title, 2, rows), Timed(64, {1: 4}, tuple(told(runs, plain, 1)))
    one = paired([2.0], [1.0])
    batch = Batch(
        *("frechet 0.25", "dual", 16, 100, (2.0,), (1.0,), (0.9,), (0.05,), one, paired([0.9], [1.0])),
        *(paired([0.95], [1.0]), 16, 5, 99.0, 9.0, 1),
        parts={"products": 3.0, "rest": 1.0},
    )
    return Found(swept, cached, timed, (batch,), dual())


def test_tables() -> None:
    pages = dict(tables(found_all()))
    assert all(len({len(line) for line in rows}) == 1 for rows in pages.values())
    (line,) = (one for one in pages["all: 4 cases"] if one[0] == "frechet 0.25")
    assert line == [
        "frechet 0.25",
        "dual",
        "75.0 (25.0 to 100.0)",
        "0.0 (0.0 to 0.0)",
        *["4.00 (4.00 to 4.00)", "2.00 (2.00 to 2.00)", "3.0", "12.0"],
    ]
    best = {one[0]: one[1] for one in pages["all: best of each rule at equal accuracy"]}
    assert best["frechet"] == "0.25" and best["quota"] == "1"
    (_, match) = pages["all: Frechet's rule over the factor rule at the matching knob"]
    assert match[2] == "1.333 (1.333 to 1.333)" and match[-3:] == ["4", "0", "0"]
    assert "16 of 16" in pages["16 requests at once against one by one"][1]
    assert pages["where the time of requests at once goes"][1][2:4] == ["75", "25"]
    assert pages["speed, up to 64 tokens"][2][4:6] == ["1.00 (1.00-1.00)", "10.00 (10.00-10.00)"]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = found_all()
    file, other = tmp_path / "a.json", tmp_path / "b.json"
    write_record(file, "slipstream bench diffusion", 0.0, {"found": replace(found, dual=None)})
    write_record(other, "slipstream bench diffusion", 0.0, {"found": Found(dual=found.dual)})
    assert merged([read(file), read(other)]) == found
    for text in (b"{}", b"[", msgspec.json.encode({"found": {"batch": 3}})):
        file.write_bytes(text)
        with pytest.raises(BenchmarkError, match="--draw"):
            read(file)
    with pytest.raises(BenchmarkError, match="--draw"):
        diffusion_report.read(tmp_path / "no.json")
