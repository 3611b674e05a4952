"""The draft benchmarks without a model: command line, arithmetic of rounds, ratios and differences, tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import drafts_acceptance, drafts_agreement, drafts_compare, drafts_options, serve_datasets
from benchmarks.drafts_acceptance import Accepted
from benchmarks.drafts_compare import Timed, requests_at, row
from benchmarks.drafts_engine import Answer, Run
from benchmarks.drafts_figures import (
    NEAR_TIE,
    Round,
    acceptance,
    agreement,
    first_difference,
    paired,
    whole_rounds,
)
from benchmarks.drafts_memory import Memory
from benchmarks.drafts_options import NONE, Options, parse, shipped
from benchmarks.drafts_prompts import mixed, questions
from benchmarks.stream import BenchmarkError
from engine.types import EngineStats, FinishReason, Request, SamplingParams, SeqUpdate, TokenLogprob

# ---- rounds ------------------------------------------------------------------------------------------------


def test_acceptance_by_hand() -> None:
    rounds = [Round(3, 3, 4), Round(3, 1, 2), Round(3, 0, 1), Round(2, 2, 3), Round(0, 0, 1)]
    found = acceptance(rounds)
    assert (found.rounds, found.tokens, found.drafted, found.accepted) == (5, 11, 11, 6)
    assert found.tokens_per_round == pytest.approx(11 / 5)
    assert found.offered == (4, 4, 3) and found.stood == (3, 2, 1)
    assert found.by_position == pytest.approx((3 / 4, 2 / 4, 1 / 3))
    assert found.given_those_before == pytest.approx((3 / 4, 2 / 3, 1 / 2))
    assert found.histogram == (2, 1, 1, 1) and sum(found.histogram) == found.rounds


def test_no_rounds_and_no_drafts_are_no_division_by_zero() -> None:
    assert acceptance([]).tokens_per_round == 0.0 and acceptance([]).by_position == ()
    plain = acceptance([Round(0, 0, 1)] * 4)
    assert plain.tokens_per_round == 1.0 and plain.given_those_before == () and plain.histogram == (4,)
    hopeless = acceptance([Round(3, 0, 1)])
    assert hopeless.given_those_before == (0.0, 0.0, 0.0)


def test_rounds_past_the_counted_tokens_are_left_out() -> None:
    rounds = [Round(7, 3, 4), Round(7, 7, 8), Round(2, 0, 1)]
    assert whole_rounds(rounds, 100) == rounds
    assert whole_rounds(rounds, 5) == rounds[:2]  # the second began after 4 tokens and counts whole
    assert whole_rounds(rounds, 4) == rounds[:1] and whole_rounds(rounds, 0) == []


# ---- pairs and differences ---------------------------------------------------------------------------------


def test_ratios_are_made_within_pairs() -> None:
    ratio = paired([10, 30, 20], [10, 10, 40])
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.5, 3.0) and str(ratio) == "1.00 (0.50-3.00)"
    for wrong in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            paired(*wrong)


def test_where_answers_part() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None and first_difference([], []) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2 and first_difference([1], [1, 2]) == 1


def test_near_ties_are_told_from_errors() -> None:
    want, names = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5]], ["a", "b", "c", "d"]
    tie = NEAR_TIE["none"] / 2
    gaps = [[1.0, 1.0, 1.0], [1.0, tie, 1.0], [tie, 0.01, tie], [1.0, 1.0]]
    found = agreement(want, [[1, 2, 3], [1, 7, 3], [1, 7, 3], [4]], names, gaps)
    assert (found.equal, found.of) == (1, 4)
    assert [(one.name, one.token, one.gap) for one in found.differences] == [
        ("b", 1, tie),
        ("c", 1, 0.01),
        ("d", 1, None),
    ]
    assert found.near_ties("none") == 1 and found.near_ties("fp16") == found.near_ties("auto") == 2
    assert found.words("none") == "1 of 4 equal, 1 part at near-ties, 2 elsewhere"
    assert agreement(want, want, names, gaps).words("none") == "4 of 4 equal"


# ---- news of a request -------------------------------------------------------------------------------------

REQUEST = Request("r", (1, 2), SamplingParams(max_tokens=9))


def test_an_answer_takes_its_news() -> None:
    answer = Answer(REQUEST, asked=10.0)
    logprobs = tuple(TokenLogprob(t, -1.0, 1, ((t, -0.5), (9, -0.75), (8, -3.0))) for t in (5, 6))
    assert not answer.take(SeqUpdate("r"), 10.5)  # a part of the prompt
    assert not answer.take(SeqUpdate("r", (4,), drafted=2, accepted=0), 11.0)  # the prompt's end is no round
    assert not answer.take(SeqUpdate("r", (5, 6), logprobs, drafted=3, accepted=1, preemptions=1), 12.0)
    assert answer.take(SeqUpdate("r", (7,), finish=FinishReason.STOP, drafted=3, accepted=2, cached_tokens=16), 13.0)
    assert answer.tokens == [4, 5, 6, 7] and answer.rounds == [Round(3, 1, 2), Round(3, 2, 1)]
    assert answer.to_first == 1.0 and (answer.first, answer.last) == (11.0, 13.0)
    assert answer.gaps == [0.25, 0.25] and answer.cached_tokens == 16
    with pytest.raises(BenchmarkError, match="r failed inside the engine: no"):
        answer.take(SeqUpdate("r", finish=FinishReason.ERROR, error="no"), 14.0)


def answered(name: str, tokens: list[int], first: float, last: float, rounds: list[Round] | None = None) -> Answer:
    return Answer(replace(REQUEST, id=name), 0.0, tokens, rounds or [], first=first, last=last)


def test_speeds_by_hand() -> None:
    run = Run((answered("a", [1] * 5, 1.0, 3.0), answered("b", [1] * 7, 2.0, 4.0)), 4.0, EngineStats())
    assert run.speed == 3.0 and run.decode_speed == (4 + 6) / 4.0
    assert Run((answered("a", [1], 1.0, 1.0),), 2.0, EngineStats()).decode_speed == 0.0


def test_a_row_of_the_comparison_by_hand() -> None:
    def timed(variant: str, number: int, seconds: float, tokens: list[int]) -> Timed:
        answers = (answered("a", tokens, seconds / 4, seconds, [Round(3, 1, 2)] if variant != "none" else []),)
        return Timed(variant, 1, number, Run(answers, seconds, EngineStats()), 0.0)

    runs = [
        timed("none", 1, 4.0, [1, 2]),
        timed("d", 0, 1.0, [1, 2]),
        timed("d", 1, 4.0, [1, 3]),
        timed("none", 0, 2.0, [1, 2]),
    ]
    found = row(runs, "d", 1, {"a": [1.0, 0.01]})
    assert (found.tokens_per_round, found.speed, found.speed_ratio.median) == (2.0, 1.25, 1.5)
    assert (found.speed_ratio.low, found.speed_ratio.high) == (1.0, 2.0)
    assert found.first_token == 0.625 and found.first_token_ratio.median == 0.75
    assert (found.same.equal, found.same.of, found.same.near_ties("auto")) == (1, 2, 1)
    plain = row(runs, "none", 1, {})
    assert plain.speed_ratio.median == 1.0 and plain.same.equal == 2
    sizes = Memory("d", 100 << 20, 10 << 20, 100 << 20, 20 << 20)
    assert sizes.share == 0.15 and sizes.cells() == ["d", "100.0", "10.0", "100.0", "20.0", "15.0 %"]
    table, memory = drafts_compare.tables(drafts_compare.Compared((plain, found), (sizes,), tuple(runs)), "auto")
    assert len({len(line) for line in table}) == 1 and table[2][-1] == "1/2 (1 near-ties)"
    assert len({len(line) for line in memory}) == 1
    assert [requests_at(clients) for clients in (1, 4, 16, 32)] == [5, 8, 18, 36]


def test_tables_of_acceptance_and_agreement() -> None:
    chains, tree = acceptance([Round(2, 1, 2)]), acceptance([Round(9, 3, 4)])
    found = [
        Accepted(name, prompts, 3, figures, name != "t")
        for name, figures in (("d", chains), ("t", tree))
        for prompts in ("x", "all")
    ]
    first, second = drafts_acceptance.tables(found)
    assert first == [["tokens per round", "x (3)", "all (3)"], ["d", "2.00", "2.00"], ["t", "4.00", "4.00"]]
    assert second == [
        ["accepted at, of all", "1", "2"],
        ["d", "1.00", "0.00"],
        ["d, given those before", "1.00", "0.00"],
    ]
    assert all("by_position" in entry for entry in drafts_acceptance.record(found))
    parted = agreement([[1]], [[2]], ["a"], [[1.0]])
    rungs = [drafts_agreement.Rung("d", name, parted, 1.5, 2, 64) for name in ("alone", "preempted", "prefix hits")]
    (table,) = drafts_agreement.tables(rungs, "none")
    assert table[1] == ["d, alone", "1", "0", "0", "1", "1.50", ""]
    assert [line[-1] for line in table[2:]] == ["2 preemptions", "64 tokens found"]


# ---- the command line and the prompts ----------------------------------------------------------------------


def options(words: str) -> Options:
    return parse(words.split())


def test_drafts_are_named_on_the_command_line() -> None:
    found = options("compare --draft dflash=a/b --draft dflash+tree=a/b --draft none --draft ngram")
    assert [one.name for one in found.variants] == ["none", "dflash", "dflash+tree", "ngram"]
    plain, tree = found.variants[1].draft, found.variants[2].draft
    assert plain is not None and tree is not None
    assert (plain.drafter, plain.path, plain.tree) == ("dflash", "a/b", 0) and tree.tree == drafts_options.TREE
    assert found.concurrency == (1, 4, 16, 32) and found.quant == "auto"
    exact = options("agreement --draft ngram --tokens 7")
    assert (exact.quant, exact.prompts, exact.tokens) == ("none", 50, 7)
    quick = options("acceptance --quick --draft ngram --sources gsm8k")
    assert quick.prompts < 10 and quick.sources == ("gsm8k",) and [one.name for one in quick.variants] == ["ngram"]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("compare --draft =x", "--draft"),
        ("compare --draft dflash+bush=x", "--draft"),
        ("compare --draft ngram+tree", "--draft"),
        ("compare --draft ngram --draft ngram", "--draft"),
        ("compare --tokens 0", "--tokens"),
        ("compare --concurrency 1,x", "--concurrency"),
        ("agreement --quant int3", "--quant"),
        ("everything", "what"),
    ],
)
def test_a_complaint_names_the_flag(arguments: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments.split())
    assert left.value.code == 2 and flag in capsys.readouterr().err


def test_what_is_shipped_is_measured(tmp_path: Path) -> None:
    assert [one.name for one in shipped(tmp_path)] == ["ngram"]
    for _, folder in drafts_options.SHIPPED:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert [one.name for one in shipped(tmp_path)] == ["ngram", "dflash", "dflash+tree", "eagle3"]
    assert NONE.draft is None


def test_prompts_are_taken_from_the_sets_in_turn(tmp_path: Path) -> None:
    files = []
    for name, count in (("a", 3), ("b", 1)):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("\n".join(f'{{"prompt": "{name}{i}"}}' for i in range(count)))
    assert [text for _, text in mixed(files, 10)] == ["a0", "b0", "a1", "a2"]
    assert len({name for name, _ in mixed(files, 3)}) == 3
    assert questions(files[0], 2) == ["a0", "a1"]


def test_gsm8k_is_read_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text('{"id": "1", "prompt": "How many?", "expected": "3"}\n{"prompt": "And now?"}\n')
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path.parent)
    monkeypatch.setitem(serve_datasets.PACKAGES, "gsm8k", ("x", tmp_path.name, file.name))
    assert questions("gsm8k", 9) == ["How many?", "And now?"]
