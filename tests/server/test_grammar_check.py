"""Grammars are tried in a child process before anything is queued: within bounds, each once, and it may die of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.grammar_hostile import HOSTILE, Case
from engine.errors import InvalidRequest, Overloaded
from engine.grammar import Grammar
from engine.structured import check
from engine.structured.check import GrammarCheck
from engine.structured.wire import Words
from tests.server.fake_engine import EOS, VOCAB, make_tokenizer

GOOD = Grammar("regex", "[ab]{2,9}")


class Counted:
    """Words, and how often they were asked for: once for each start of a process."""

    def __init__(self) -> None:
        self.starts = 0
        self._lock = threading.Lock()

    def __call__(self) -> Words:
        with self._lock:
            self.starts += 1
        return Words.of(make_tokenizer(), VOCAB, (EOS,))


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarCheck]:
    checker = GrammarCheck(Counted())
    yield checker
    checker.close()


def problem(checker: GrammarCheck, grammar: Grammar) -> str:
    """Empty where there is none."""
    try:
        checker.ensure(grammar, "field")
    except InvalidRequest as error:
        assert error.param == "field" and error.message.startswith("field ")
        return error.message
    return ""


SLOW = (
    *("multiples of many primes", "repeats of repeats of repeats", "8000 optional parts", "100 KB as they stand"),
    *("a million letters", "multiples of a large prime", "1000 optional properties", "3000 optional properties"),
)
CASES = [
    pytest.param(case, marks=pytest.mark.slow if case.name in SLOW else (), id=f"{case.kind}: {case.name}")
    for case in HOSTILE
]


@pytest.mark.parametrize("case", CASES)
def test_hostile_grammars_get_a_verdict_and_leave_the_checker_well(shared: GrammarCheck, case: Case) -> None:
    found = problem(shared, Grammar(case.kind, case.text))
    assert len(found) < 700
    if case.refused is not None:
        assert bool(found) is case.refused, found
    assert problem(shared, GOOD) == ""


def test_a_text_that_takes_too_long_is_cut_off_and_may_be_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = next(case for case in HOSTILE if case.name == "a long text that is forced")
    words = Counted()
    checker = GrammarCheck(words, seconds=0.05)
    grammar = Grammar(slow.kind, slow.text)
    try:
        assert "too long" in problem(checker, grammar)
        assert words.starts == 1
        assert "too long" in problem(checker, grammar)
        assert words.starts == 1  # remembered
        monkeypatch.setattr(check, "FORGET_SECONDS", 0.0)
        later = Grammar("lark", slow.text + "\n// another text\n")
        assert problem(checker, later) and problem(checker, later)
        assert words.starts == 3  # not remembered: the process was started for each
    finally:
        checker.close()


def test_a_process_that_dies_is_started_again_and_its_text_is_refused() -> None:
    deep = next(case for case in HOSTILE if case.name == "a chain of 3000 rules")
    words = Counted()
    checker = GrammarCheck(words)
    try:
        assert problem(checker, GOOD) == ""
        assert "too deep a recursion" in problem(checker, Grammar(deep.kind, deep.text))
        assert problem(checker, Grammar("regex", "after")) == ""
        assert words.starts == 2
        assert "too deep a recursion" in problem(checker, Grammar(deep.kind, deep.text))
        assert words.starts == 2  # the verdict was kept: the text is not tried twice
    finally:
        checker.close()


def test_verdicts_are_bounded(monkeypatch: pytest.MonkeyPatch, shared: GrammarCheck) -> None:
    monkeypatch.setattr(check, "MAX_VERDICTS", 5)
    for number in range(20):
        assert problem(shared, Grammar("regex", f"x{number}")) == ""
    assert len(shared._verdicts) == 5
    assert not shared._running


@pytest.mark.asyncio
async def test_the_same_grammar_is_tried_once_for_many_that_ask(shared: GrammarCheck) -> None:
    asked = []
    pool = shared._pool.submit

    def submit(*call: object) -> object:
        asked.append(call)
        return pool(*call)  # type: ignore[arg-type]

    shared._pool.submit = submit  # type: ignore[assignment]
    try:
        await asyncio.gather(*(shared.admit(Grammar("regex", "once{7}")) for _ in range(20)))
        await shared.admit(Grammar("regex", "once{7}"))
    finally:
        shared._pool.submit = pool  # type: ignore[method-assign]
    assert len(asked) == 1


@pytest.mark.asyncio
async def test_too_many_at_once_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch, shared: GrammarCheck) -> None:
    monkeypatch.setattr(check, "MAX_WAITING", 4)
    calls = (shared.admit(Grammar("regex", f"crowd{number}{{3}}")) for number in range(30))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), Overloaded}
    assert sum(result is None for result in results) >= 4
    await shared.admit(GOOD)


@pytest.mark.asyncio
async def test_who_stops_waiting_leaves_the_others_their_verdict(shared: GrammarCheck) -> None:
    grammar = Grammar("json", json.dumps({"type": "integer", "multipleOf": 19_997}))
    first = asyncio.create_task(shared.admit(grammar))
    second = asyncio.create_task(shared.admit(grammar))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()


def test_a_model_without_an_end_says_so() -> None:
    checker = GrammarCheck(lambda: Words.of(make_tokenizer(), VOCAB, ()))
    try:
        with pytest.raises(InvalidRequest, match="end-of-sequence"):
            checker.ensure(GOOD)
    finally:
        checker.close()


def test_who_waits_when_it_closes_is_told_so() -> None:
    slow = next(case for case in HOSTILE if case.name == "multiples of many primes")
    words = Counted()
    checker = GrammarCheck(words)
    waiting = threading.Thread(target=checker.close)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            checker.ensure(Grammar(slow.kind, slow.text))
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while words.starts == 0:
        time.sleep(0.001)
    waiting.start()
    waiting.join()
    asking.join()
    assert [type(error) for error in errors] == [Overloaded]
    with pytest.raises(Overloaded):
        checker.ensure(GOOD)


def test_closing_ends_the_processes() -> None:
    checker = GrammarCheck(Counted())
    checker.ensure(GOOD)
    processes = [probe._process for probe in checker._all if probe._process is not None]
    checker.close()
    assert len(processes) == 1
    assert processes[0].poll() is not None
    checker.close()
