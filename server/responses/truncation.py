"""`truncation: auto`: where a conversation does not fit into the context, its oldest turns are left out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from server.convert import Job
from server.errors import ApiError
from server.parts import Fields

ALWAYS_KEPT = ("system", "developer")  # at the beginning of a conversation


def beginnings(messages: Sequence[Fields]) -> list[int]:
    """Where the rest of a conversation may begin, first to last: at its beginning, and at each later user's turn."""
    first = kept(messages)
    turns = [i for i, message in enumerate(messages) if i > first and message["role"] == "user"]
    return [first, *turns]


def kept(messages: Sequence[Fields]) -> int:
    """How many messages at the beginning are never left out."""
    return next((i for i, message in enumerate(messages) if message["role"] not in ALWAYS_KEPT), len(messages))


async def fitted(messages: Sequence[Fields], job: Callable[[int], Awaitable[Job]]) -> Job:
    """The job with the most of the conversation that fits, or else with all of it, which will be refused.

    `job(start)` makes one without the messages from `kept` to `start`. Raises what that raises, but for an overflow.
    """
    starts = beginnings(messages)
    found = await _tried(job, starts[0])
    low, high = (1 if found is None else 0), (len(starts) if found is None else 0)
    while low < high:  # a later start never takes more room
        middle = (low + high) // 2
        tried = await _tried(job, starts[middle])
        low, high = (middle + 1, high) if tried is None else (low, middle)
        found = found if tried is None else tried
    return await job(starts[0]) if found is None else found


async def _tried(job: Callable[[int], Awaitable[Job]], start: int) -> Job | None:
    """None if the prompt leaves no room for an answer."""
    try:
        made = await job(start)
    except ApiError as error:
        if error.code == "context_length_exceeded":
            return None
        raise
    return made if len(made.prompts[0].ids) < made.engine.info.max_model_len else None
