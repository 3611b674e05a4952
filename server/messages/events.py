"""The answers of /v1/messages, and the events of streamed ones, in Anthropic's order."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import msgspec

from server.convert import Job
from server.errors import ApiError
from server.messages.errors import error_fields
from server.parts import Fields
from server.stretches import Ending, Scores, Stretch

_DELTAS = {"content": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking")}


class MessageEvents:
    """A `stretches.Dialect`: stretches are content blocks."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._id = f"msg_{secrets.token_hex(16)}"
        self._content: list[Fields] = []
        self._ending: Fields = _stopped(None)
        self._usage: Fields = {"input_tokens": len(job.prompts[0].ids), "output_tokens": 0}
        self._reports: Fields = {}

    def begun(self) -> Iterator[Fields]:
        yield {"type": "message_start", "message": self.answer()}
        yield {"type": "ping"}

    def opened(self, stretch: Stretch) -> Iterator[Fields]:
        block = _block(stretch, empty=True)
        yield {"type": "content_block_start", "index": stretch.place, "content_block": block}

    def grown(self, stretch: Stretch, text: str, scores: Scores) -> Iterator[Fields]:  # noqa: ARG002  as in the contract
        kind, name = _DELTAS.get(stretch.kind, ("input_json_delta", "partial_json"))
        yield {"type": "content_block_delta", "index": stretch.place, "delta": {"type": kind, name: text}}

    def closed(self, stretch: Stretch, cut: bool) -> Iterator[Fields]:  # noqa: ARG002  as in the contract
        self._content.append(_block(stretch))
        yield {"type": "content_block_stop", "index": stretch.place}

    def ended(self, ending: Ending) -> Iterator[Fields]:
        self._ending, self._usage, self._reports = _stop(ending), _usage(ending.usage), ending.reports
        yield {"type": "message_delta", "delta": self._ending, "usage": self._usage, **self._reports}
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterator[Fields]:
        yield error_fields(error.status_code, error.detail, error.param)

    def answer(self) -> Fields:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._job.model}
        return {**head, "content": list(self._content), **self._ending, "usage": self._usage, **self._reports}


def _block(stretch: Stretch, empty: bool = False) -> Fields:
    text = "" if empty else stretch.text
    match stretch.kind:
        case "call":
            return {"type": "tool_use", "id": stretch.call_id, "name": stretch.name, "input": _arguments(text)}
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        case _:
            return {"type": "text", "text": text, "citations": None}


def _arguments(text: str) -> Fields:
    """A call's arguments; empty where the answer was cut in the middle of them."""
    try:
        found: object = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _stop(ending: Ending) -> Fields:
    if ending.finish != "stop":
        return _stopped("max_tokens")
    if ending.called:
        return _stopped("tool_use")
    if isinstance(ending.stop_reason, str):
        return _stopped("stop_sequence", ending.stop_reason)
    return _stopped("end_turn")


def _stopped(reason: str | None, sequence: str | None = None) -> Fields:
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _usage(usage: Fields) -> Fields:
    """A message's usage from a chat's. What the cache gave does not count as input here."""
    prompt, details = usage["prompt_tokens"], usage["prompt_tokens_details"]
    assert isinstance(prompt, int) and isinstance(details, dict)
    cached = details["cached_tokens"]
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
