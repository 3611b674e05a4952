"""A request's output in the front process: what its report says of drafting, wherever the answer is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.diffusion import DiffusionParams, DiffusionReport
from engine.front.output import RequestOutput, merge
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import (
    FinishReason,
    Passes,
    Request,
    SamplingParams,
    SeqUpdate,
    SpeculationParams,
    SpeculationReport,
    TokenEvent,
)
from tests.unit.fake_worker import write_checkpoint

Round = tuple[str, int, int]  # text (a byte a token), drafted, accepted


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("model")))


def run(
    tokenizer: Tokenizer,
    rounds: list[Round],
    *,
    stop: tuple[str, ...] = (),
    report: bool = True,
    trace: bool = True,
    leaf: bool = False,
) -> list[TokenEvent]:
    """The events of a request whose last round ends it; nothing is read behind a stop string."""
    sampling = SamplingParams(1000, stop=stop)
    wish = SpeculationParams(report=report, trace=trace)
    output = RequestOutput(Request("r", (1,), sampling, speculation=wish), tokenizer)
    events = []
    for i, (text, drafted, accepted) in enumerate(rounds):
        finish = FinishReason.LENGTH if i == len(rounds) - 1 else None
        tokens = tuple(text.encode())
        update = SeqUpdate("r", tokens, finish=finish, drafted=drafted, accepted=accepted, leaf=leaf and drafted > 0)
        event = output.take(update, 0.0)
        if event is not None:
            events.append(event)
            if event.finish is not None:
                break
    return events


ROUNDS: list[Round] = [("a", 0, 0), ("bcd", 4, 2), ("e", 3, 0), ("fghij", 4, 4), ("k", 0, 0), ("lm", 1, 1)]


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "report"),
    [
        ((), "abcdefghijklm", 13, SpeculationReport(4, 12, 7, (1, 1, 1, 0, 1))),
        (("a",), "", 1, SpeculationReport()),  # before the first round
        (("b",), "a", 2, SpeculationReport(1, 4, 1, (0, 1))),  # the first of two that stood
        (("c",), "ab", 3, SpeculationReport(1, 4, 2, (0, 0, 1))),  # the last one that stood
        (("d",), "abc", 4, SpeculationReport(1, 4, 2, (0, 0, 1))),  # the target's own token
        (("e",), "abcd", 5, SpeculationReport(2, 7, 2, (1, 0, 1))),
        (("gh",), "abcdef", 8, SpeculationReport(3, 11, 5, (1, 0, 1, 1))),
        (("def",), "abc", 6, SpeculationReport(3, 11, 3, (1, 1, 1))),  # held back over three rounds
        (("zz",), "abcdefghijklm", 13, SpeculationReport(4, 12, 7, (1, 1, 1, 0, 1))),
    ],
)
def test_the_report_ends_where_the_answer_ends(
    tokenizer: Tokenizer, stop: tuple[str, ...], text: str, tokens: int, report: SpeculationReport
) -> None:
    events = run(tokenizer, ROUNDS, stop=stop)
    assert "".join(event.text for event in events) == text
    assert events[-1].speculation == replace(report, tokens=tokens) and events[-1].usage.completion_tokens == tokens
    assert [event.speculation for event in events[:-1]] == [None] * (len(events) - 1)


def test_only_those_who_ask_get_a_report(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, ROUNDS, report=False)[-1].speculation is None
    assert run(tokenizer, [("abc", 0, 0)])[-1].speculation == SpeculationReport(tokens=3)


def test_merged_events_keep_the_report(tokenizer: Tokenizer) -> None:
    events = run(tokenizer, ROUNDS)
    assert merge(events).speculation == merge(events[-2:]).speculation == events[-1].speculation
    assert merge(events[:-1]).speculation is None


@pytest.mark.parametrize(
    ("stop", "origins"),
    [
        ((), "p" "ddc" "c" "ddddb" "p" "db"),
        (("b",), "pd"),
        (("c",), "pdd"),
        (("d",), "pddc"),
        (("def",), "pddccd"),  # the tokens of a stop string belong to the answer, their text does not
    ],
)  # fmt: skip
def test_origins_follow_the_rounds(tokenizer: Tokenizer, stop: tuple[str, ...], origins: str) -> None:
    events = run(tokenizer, ROUNDS, stop=stop)
    assert "".join(event.origins or "" for event in events) == merge(events).origins == origins
    assert all(len(event.origins or "") == len(event.token_ids) == len(event.offsets) for event in events)


def test_a_token_behind_a_leaf_of_a_tree_is_a_bonus(tokenizer: Tokenizer) -> None:
    (event,) = run(tokenizer, [("abc", 16, 2)], leaf=True)
    assert event.origins == "ddb"


@pytest.mark.parametrize(
    ("stop", "temperature", "tokens", "bias", "decoder", "bound"),
    [
        ((), 1.0, 13, 0.125 * 3 + 0.25 * 2, "relaxed", 0.3),
        (("c",), 1.0, 3, 0.125 * 2, "relaxed", 0.3),  # behind the second that stood
        (("def",), 1.0, 6, 0.125 * 2 + 0.25 * 2, "relaxed", 0.3),
        ((), 0.0, 13, 0.125 * 3 + 0.25 * 2, "relaxed_greedy", None),
    ],
)
def test_bias_is_that_of_the_answers_tokens(
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    temperature: float,
    tokens: int,
    bias: float,
    decoder: str,
    bound: float | None,
) -> None:
    """An update may have no bias at all: then its tokens have none."""
    told = {"bcd": (0.125, 0.125, 0.25), "e": (0.25,), "lm": (0.125, 0.0)}
    wish = SpeculationParams(report=True, verifier="ensemble", knobs=(("target_weight", 0.7),), bias_bound=0.3)
    sampling = SamplingParams(1000, temperature, stop=stop)
    output = RequestOutput(Request("r", (1,), sampling, speculation=wish), tokenizer)
    report = None
    for i, (text, drafted, accepted) in enumerate(ROUNDS):
        finish = FinishReason.LENGTH if i == len(ROUNDS) - 1 else None
        update = SeqUpdate("r", tuple(text.encode()), finish=finish, drafted=drafted, accepted=accepted)
        event = output.take(replace(update, bias=told.get(text, ())), 0.0)
        if event is not None and event.finish is not None:
            report = event.speculation
            break
    assert report is not None
    assert (report.tokens, report.bias, report.decoder, report.bias_bound) == (tokens, bias, decoder, bound)
    assert (report.verifier, report.knobs) == ("ensemble", (("target_weight", 0.7),))


def test_only_those_who_ask_get_origins(tokenizer: Tokenizer) -> None:
    events = run(tokenizer, ROUNDS, trace=False)
    assert {event.origins for event in events} == {merge(events).origins} == {None}


@st.composite
def some_rounds(draw: st.DrawFn) -> list[Round]:
    """Rounds as a scheduler sends them: at most the accepted drafts and one token more; the last may be cut short."""
    rounds = []
    for _ in range(draw(st.integers(1, 8))):
        drafted = draw(st.integers(0, 5))
        accepted = draw(st.integers(0, drafted))
        rounds.append((draw(st.text("abc", min_size=accepted + 1, max_size=accepted + 1)), drafted, accepted))
    text, drafted, accepted = rounds[-1]
    return [*rounds[:-1], (text[: draw(st.integers(0, len(text)))], drafted, accepted)]


@given(some_rounds(), st.lists(st.text("abc", min_size=1, max_size=4), max_size=2))
def test_the_books_add_up(tokenizer: Tokenizer, rounds: list[Round], stops: list[str]) -> None:
    events = run(tokenizer, rounds, stop=tuple(stops))
    last, origins = events[-1], merge(events).origins
    report = last.speculation
    assert origins is not None and len(origins) == last.usage.completion_tokens
    assert report is not None and origins.count("d") == report.accepted
    assert origins.count("c") + origins.count("b") <= report.rounds
    assert report is not None
    assert report.rounds == sum(report.histogram)
    assert report.accepted == sum(stood * count for stood, count in enumerate(report.histogram))
    assert report.accepted <= min(report.drafted, last.usage.completion_tokens)
    assert not report.histogram or report.histogram[-1] > 0
    if last.stop_reason is None:
        assert (report.rounds, report.drafted) == (sum(d > 0 for _, d, _ in rounds), sum(d for _, d, _ in rounds))


def test_the_report_of_a_denoised_request_counts_all_passes_and_the_tokens_of_the_answer(tokenizer: Tokenizer) -> None:
    wish = DiffusionParams(rule="frechet", canvas=16, report=True)
    steps = [("ab", Passes(2, 3, 1, 4, 99)), ("cdef", Passes(5, 6, 2, 4, 200)), ("g", None)]
    for stop, tokens, passes in (((), 7, Passes(5, 6, 2, 4, 200)), (("b",), 2, Passes(2, 3, 1, 4, 99))):
        request = Request("r", (1,), SamplingParams(16, stop=stop), diffusion=wish)
        output, events = RequestOutput(request, tokenizer), []
        for i, (text, so_far) in enumerate(steps):
            finish = FinishReason.LENGTH if i == 2 else None
            event = output.take(SeqUpdate("r", tuple(text.encode()), finish=finish, passes=so_far), 0.0)
            events += [] if event is None else [event]
            if events and events[-1].finish is not None:
                break
        report = DiffusionReport(wish, passes.forwards, passes.draft_forwards, passes.verifies, passes.remasked, tokens)
        assert [event.diffusion for event in events] == [None] * (len(events) - 1) + [report]
        assert merge(events).diffusion == report and events[-1].usage.completion_tokens == tokens
    silent = RequestOutput(Request("r", (1,), SamplingParams(16)), tokenizer)
    event = silent.take(SeqUpdate("r", (97,), finish=FinishReason.LENGTH, passes=Passes(1)), 0.0)
    assert event is not None and event.diffusion is None
