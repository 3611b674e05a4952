"""Events that a sink takes at once, and those that it leaves to the iteration."""

from __future__ import annotations

import pytest

from engine.front.event_stream import EventStream
from engine.types import FinishReason, TokenEvent, Usage

pytestmark = pytest.mark.asyncio


def event(token: int, finish: FinishReason | None = None, name: str = "a") -> TokenEvent:
    return TokenEvent(name, (token,), str(token), Usage(1, token), finish=finish)


async def test_a_sink_takes_events_until_it_can_not() -> None:
    stream, taken = EventStream(("a",), lambda _: None), []
    room = [2]

    def sink(event: TokenEvent) -> bool:
        if room[0] == 0:
            return False
        room[0] -= 1
        taken.append(event.token_ids)
        return True

    stream.divert(sink)
    for token in (1, 2, 3):
        stream.put(event(token))
    room[0] = 9
    stream.put(event(4))  # may not overtake the third
    assert taken == [(1,), (2,)]
    assert (await anext(stream)).token_ids == (3, 4)
    stream.put(event(5, FinishReason.STOP))
    assert taken == [(1,), (2,), (5,)]
    assert [left async for left in stream] == []


async def test_what_a_sink_raises_is_raised_from_the_iteration_and_aborts_the_rest() -> None:
    aborted: list[frozenset[str]] = []
    stream = EventStream(("a", "b"), aborted.append)

    def sink(event: TokenEvent) -> bool:
        raise KeyError(event.text)

    stream.divert(sink)
    stream.put(event(1))
    stream.put(event(2, name="b"))
    with pytest.raises(KeyError):
        while True:
            await anext(stream)
    assert aborted == [frozenset("b")]
