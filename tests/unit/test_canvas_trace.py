"""What a client is shown of a canvas: the difference of each step, up to where the answer ends, and no step twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.diffusion import CanvasNews, CanvasStep, DiffusionParams
from engine.front.canvas_trace import CanvasTrace
from engine.front.output import RequestOutput, merge
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import FinishReason, Request, SamplingParams, SeqUpdate, TokenEvent
from tests.unit.fake_worker import write_checkpoint

PROMPT, STOP = (1, 2, 3), 9


def request(max_tokens: int = 8, canvas: int = 8, min_tokens: int = 0, stop: tuple[str, ...] = ()) -> Request:
    sampling = SamplingParams(max_tokens, min_tokens=min_tokens, stop=stop)
    return Request("r", PROMPT, sampling, eos_ids=(STOP,), diffusion=DiffusionParams(canvas=canvas, trace=True))


def step(
    turn: int, filled: dict[int, int], remasked: tuple[int, ...] = (), block: tuple[int, int] = (0, 8)
) -> CanvasStep:
    """Of places behind the prompt."""
    start, stop = (len(PROMPT) + place for place in block)
    placed = tuple((len(PROMPT) + place, token) for place, token in filled.items())
    return CanvasStep(start, stop, turn, placed, tuple(len(PROMPT) + place for place in remasked))


def shown(news: list[CanvasNews]) -> dict[int, int]:
    """What a client makes of it."""
    view: dict[int, int] = {}
    for count, one in enumerate(news, start=1):
        assert one.step == count and one.block[0] <= one.block[1] <= one.room
        for place in one.remasked:
            del view[place]
        view |= dict(one.filled)
        view = {place: token for place, token in view.items() if one.end is None or place < one.end}
    return view


def take(trace: CanvasTrace, *steps: CanvasStep) -> list[CanvasNews]:
    return [news for one in steps for news in trace.take(one, None, 0)]


def test_steps_are_told_by_place() -> None:
    news = take(CanvasTrace(request()), step(1, {4: 40, 0: 50}), step(2, {1: 51}))
    assert news == [CanvasNews(1, 8, (0, 8), ((0, 50), (4, 40)), ()), CanvasNews(2, 8, (0, 8), ((1, 51),), ())]


def test_nothing_behind_an_end_is_told() -> None:
    """An end that comes late takes back what was told behind it; what is filled there later is not told at all."""
    trace = CanvasTrace(request())
    first, end, rest = take(trace, step(1, {0: 50, 6: 60}), step(2, {3: STOP, 5: 61}), step(3, {1: 51, 7: 62}))
    assert (first.filled, first.end) == (((0, 50), (6, 60)), None)
    assert (end.filled, end.remasked, end.end) == (((3, STOP),), (), 4)
    assert (rest.filled, rest.end) == (((1, 51),), 4)
    assert shown([first, end, rest]) == {0: 50, 1: 51, 3: STOP}


def test_a_step_that_changes_nothing_to_see_is_not_told() -> None:
    trace = CanvasTrace(request())
    assert len(take(trace, step(1, {2: STOP}), step(2, {5: 7, 6: 7}), step(3, {0: 1}))) == 2


def test_an_end_that_is_taken_back_brings_back_what_stood_behind_it() -> None:
    trace = CanvasTrace(request())
    news = take(trace, step(1, {2: STOP, 5: 70}), step(2, {4: 71}), step(3, {0: 50}, (2,)), step(4, {5: STOP}))
    assert [one.end for one in news] == [3, None, 6]
    assert (news[1].filled, news[1].remasked) == (((0, 50), (4, 71), (5, 70)), (2,))
    assert shown(news) == {0: 50, 4: 71, 5: STOP}


def test_a_token_in_place_of_another_is_filled_again() -> None:
    first, second = take(CanvasTrace(request()), step(1, {0: 5, 1: 6}), step(2, {0: 7}))
    assert (second.filled, second.remasked) == (((0, 7),), ()) and first.filled == ((0, 5), (1, 6))


def test_no_more_than_was_asked_for_and_no_end_before_min_tokens() -> None:
    """The last block is wider than `max_tokens`; its first place belongs to the prompt."""
    trace = CanvasTrace(request(max_tokens=5, canvas=8, min_tokens=2))
    (news,) = take(trace, step(1, {0: STOP, 4: 40, 5: 41, 6: STOP}, block=(-1, 7)))
    assert (news.filled, news.end, news.room, news.block) == (((0, STOP), (4, 40)), None, 5, (0, 5))
    (last,) = trace.take(None, FinishReason.LENGTH, 5)
    assert (last.filled, last.end) == ((), 5)


@given(st.data())
def test_a_replay_is_told_once(data: st.DataObject) -> None:
    """Wherever a request is pushed out: its open block comes again from its first turn, and goes on from there."""
    blocks = [(0, 4), (4, 8)]
    steps = [
        [
            step(1, {2: 12}, block=blocks[0]),
            step(2, {0: 10, 1: 11}, (2,), blocks[0]),
            step(3, {2: 19, 3: 13}, (), blocks[0]),
        ],
        [
            step(1, {7: 17}, block=blocks[1]),
            step(2, {4: 14}, (7,), blocks[1]),
            step(3, {5: 15, 6: 16, 7: 18}, (), blocks[1]),
        ],
    ]
    calm = take(CanvasTrace(request()), *steps[0], *steps[1])
    seen: list[CanvasStep] = []
    for block in steps:
        cuts = data.draw(st.lists(st.integers(0, 3), max_size=3))
        seen += [one for cut in cuts for one in block[:cut]] + block
    assert take(CanvasTrace(request()), *seen) == calm
    assert shown(calm) == {0: 10, 1: 11, 2: 19, 3: 13, 4: 14, 5: 15, 6: 16, 7: 18}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("model")))


def events(tokenizer: Tokenizer, one: Request, updates: list[SeqUpdate]) -> list[TokenEvent]:
    output = RequestOutput(one, tokenizer)
    return [event for update in updates if (event := output.take(update, 0.0)) is not None]


def test_events_without_text_and_the_last_state_at_a_stop_string(tokenizer: Tokenizer) -> None:
    """A stop string ends the answer in the middle of what the engine handed over."""
    updates = [
        SeqUpdate("r", canvas=step(1, {4: ord("e")})),
        SeqUpdate("r", tuple(b"abcd"), canvas=step(2, {i: ord("abcd"[i]) for i in range(4)})),
    ]
    told = events(tokenizer, request(stop=("bc",)), updates)
    assert [(event.text, event.token_ids) for event in told] == [("", ()), ("a", tuple(b"abc"))]
    assert told[-1].finish is FinishReason.STOP
    view = shown([news for event in told for news in event.canvas])
    assert view == dict(enumerate(b"abc")) and told[-1].canvas[-1].end == 3
    assert merge(told).canvas == told[0].canvas + told[1].canvas


def test_who_does_not_ask_hears_nothing(tokenizer: Tokenizer) -> None:
    plain = Request("r", PROMPT, SamplingParams(8), diffusion=DiffusionParams(canvas=8))
    assert events(tokenizer, plain, [SeqUpdate("r", canvas=step(1, {4: 4}))]) == []
