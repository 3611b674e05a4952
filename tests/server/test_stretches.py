"""From events to stretches: what is opened, grown and closed, however the events are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.types import FinishReason, TokenEvent, TokenLogprob, Usage
from server.convert import Job
from server.errors import ApiError
from server.fragments import Fragment
from server.parts import Fields
from server.prompts import Prompt
from server.stretches import Ending, NamedEvents, Scores, Stretch
from tests.server.fake_engine import FakeEngine


@dataclass
class Letters:
    """A manner: two letters are a fragment, its part (r, c, or the index of a call) and its text. `.` is silent."""

    called: str = ""

    def parser(self) -> Letters:
        return Letters()

    def feed(self, text: str) -> Sequence[Fragment]:
        return [self._one(text[i], text[i + 1]) for i in range(0, len(text), 2) if text[i] != "."]

    def _one(self, part: str, text: str) -> Fragment:
        if not part.isdigit():
            return Fragment("reasoning" if part == "r" else "content", text)
        first = part not in self.called
        self.called += part
        return Fragment("call", text, int(part), f"id{part}" if first else "", f"name{part}" if first else "")

    def end(self) -> Sequence[Fragment]:
        return ()


class Diary:
    """A dialect that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.scores: list[tuple[int, list[int]]] = []
        self.ending: Ending | None = None

    def begun(self) -> Iterator[Fields]:
        yield from self._note("begun")

    def opened(self, stretch: Stretch) -> Iterator[Fields]:
        yield from self._note(f"open {stretch.place} {stretch.kind} {stretch.name}".rstrip())

    def grown(self, stretch: Stretch, text: str, scores: Scores) -> Iterator[Fields]:
        self.scores.append((stretch.place, [entry.token_id for entry in scores]))
        yield from self._note(f"grow {stretch.place} {text}")

    def closed(self, stretch: Stretch, cut: bool) -> Iterator[Fields]:
        yield from self._note(f"close {stretch.place} {stretch.text}{' cut' if cut else ''}")

    def ended(self, ending: Ending) -> Iterator[Fields]:
        self.ending = ending
        yield from self._note(f"end {ending.finish}")

    def failed(self, error: ApiError) -> Iterator[Fields]:
        yield from self._note(f"failed {error.code}")

    def answer(self) -> Fields:
        return {"told": self.told}

    def _note(self, what: str) -> Iterator[Fields]:
        self.told.append(what)
        yield {"type": what.split()[0], "what": what}


def events(*texts: str, finish: FinishReason = FinishReason.STOP) -> list[TokenEvent]:
    """Each with one token, whose id is its place, and its score."""
    found = [
        TokenEvent("j-0", (i,), text, Usage(1, i + 1), logprobs=(TokenLogprob(i, -1.0, 1),))
        for i, text in enumerate(texts)
    ]
    return [*found[:-1], replace(found[-1], finish=finish)]


def written(*told: TokenEvent) -> Diary:
    engine, diary = FakeEngine(), Diary()
    job = Job("j", "tiny", 0, engine, (Prompt((1,)),), 1, (), manner=Letters())
    NamedEvents(job, diary).whole([told])
    return diary


def test_one_after_the_other() -> None:
    diary = written(*events("ra", "rb", "cx", "cy", "0{", "0}", "1{", "cz"))
    assert diary.told == [
        "begun",
        *("open 0 reasoning", "grow 0 a", "grow 0 b", "close 0 ab"),
        *("open 1 content", "grow 1 x", "grow 1 y", "close 1 xy"),
        *("open 2 call name0", "grow 2 {", "grow 2 }", "close 2 {}"),
        *("open 3 call name1", "grow 3 {", "close 3 {"),
        *("open 4 content", "grow 4 z", "close 4 z"),
        "end stop",
    ]
    assert diary.ending is not None and diary.ending.called


def test_the_end_of_what_was_cut() -> None:
    diary = written(*events("cx", "0{", finish=FinishReason.LENGTH))
    assert diary.told[-3:] == ["grow 1 {", "close 1 { cut", "end length"]


def test_a_stop_string_in_the_middle_of_a_call() -> None:
    diary = written(*events("0{", "0}", "1{"))
    assert diary.told[-3:] == ["grow 1 {", "close 1 { cut", "end stop"]
    assert diary.ending is not None and not diary.ending.called
    whole = written(*events("0{", "0}", "1{", "1}"))
    assert whole.told[-2:] == ["close 1 {}", "end stop"]
    assert whole.ending is not None and whole.ending.called


def test_nothing_at_all_is_an_empty_content() -> None:
    diary = written(*events(""))
    assert diary.told == ["begun", "open 0 content", "close 0 ", "end stop"]


def test_scores_stand_with_the_content_that_came_with_them() -> None:
    diary = written(*events("ra", "r.", "", "cx", "", "cy", "0{", ""))
    assert diary.scores == [(0, []), (0, []), (1, [2, 3]), (1, [4, 5]), (2, [])]


def test_an_event_of_several_parts_gives_its_scores_to_its_content() -> None:
    diary = written(*events("rarbcxcy", "0{0}"))
    assert diary.scores == [(0, []), (1, [0]), (2, [])]
    assert [what for what in diary.told if what.startswith("grow")] == ["grow 0 ab", "grow 1 xy", "grow 2 {}"]


@given(st.lists(st.sampled_from(["ra", "cx", "cy", "0{", "1}", ".."]), min_size=1, max_size=12), st.randoms())
def test_how_events_are_cut_makes_no_difference(fragments: list[str], random: Random) -> None:
    """Stretches have the same texts, and are told in the same order."""
    glued, rest = [], list(fragments)
    while rest:
        count = random.randint(1, len(rest))
        glued.append("".join(rest[:count]))
        rest = rest[count:]

    def ends(diary: Diary) -> list[str]:
        return [what for what in diary.told if not what.startswith("grow")]

    assert ends(written(*events(*glued))) == ends(written(*events(*fragments)))


@pytest.mark.parametrize("finish", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_end_that_is_no_answer_is_raised(finish: FinishReason) -> None:
    with pytest.raises(Exception, match="request"):
        written(*events("cx", finish=finish))
