"""The objects of /v1/responses: a response, its output items, its usage, its errors."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from server.convert import Job
from server.errors import ApiError
from server.logprobs import Spelling, chat_entry
from server.parts import Fields
from server.responses.convert import function_tools
from server.responses.items import new_id
from server.responses.schemas import AllowedTools, NamedTool, Reasoning, ResponsesBody, Text, TextFormat
from server.schemas import default
from server.stretches import Scores, Stretch


@dataclass(slots=True)
class Draft:
    """A response while it is written."""

    body: ResponsesBody
    job: Job
    id: str = field(default_factory=lambda: new_id("resp"))
    status: str = "in_progress"
    output: list[Fields] = field(default_factory=list)
    usage: Fields | None = None
    error: Fields | None = None
    reports: Fields = field(default_factory=dict)
    _asked: Fields = field(init=False)

    def __post_init__(self) -> None:
        self._asked = _asked(self.body)

    def fields(self) -> Fields:
        """The response as it stands."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.job.created,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "status": self.status,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "model": self.job.model,
            "output": list(self.output),
            "usage": self.usage,
            **self._asked,
            **self.reports,
        }


def _asked(body: ResponsesBody) -> Fields:
    """What the client has asked for, with the defaults that hold where it has not."""
    text, reasoning = body.text or Text(), body.reasoning or Reasoning()
    form = text.format or TextFormat(type="text")
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": default(body.temperature, 1.0),
        "top_p": default(body.top_p, 1.0),
        "top_logprobs": default(body.top_logprobs, 0),
        "tools": [tool.model_dump() for tool in function_tools(body)],
        "tool_choice": _choice(body),
        "parallel_tool_calls": default(body.parallel_tool_calls, True),
        "text": {
            "format": form.model_dump(by_alias=True, exclude_none=True),
            "verbosity": default(text.verbosity, "medium"),
        },
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "truncation": default(body.truncation, "disabled"),
        "metadata": default(body.metadata, {}),
        "store": default(body.store, True),
        "background": False,
        "service_tier": "default",
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


def _choice(body: ResponsesBody) -> object:
    choice = body.tool_choice
    if isinstance(choice, NamedTool | AllowedTools):
        return choice.model_dump()
    return default(choice, "auto")


def usage_fields(usage: Fields) -> Fields:
    """A response's usage from a chat's."""
    prompt, completion = usage["prompt_tokens_details"], usage["completion_tokens_details"]
    assert isinstance(prompt, dict) and isinstance(completion, dict)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": prompt["cached_tokens"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": completion["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }


def error_fields(error: ApiError) -> Fields:
    """What a failed response says. The API has few codes for that."""
    code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status_code, "server_error")
    return {"code": code, "message": error.detail}


class Writer:
    """The items and parts of a response's output."""

    def __init__(self, spell: Spelling, top: int) -> None:
        self._spell = spell
        self._top = top

    def item(self, id: str, stretch: Stretch, status: str) -> Fields:
        """An item as it stands; empty while its status is in_progress."""
        text, head = stretch.text if status != "in_progress" else "", {"id": id, "status": status}
        parts = [self.part(stretch)] if status != "in_progress" else []
        if stretch.kind == "call":
            call = {"type": "function_call", "call_id": stretch.call_id, "name": stretch.name, "arguments": text}
            return {**head, **call}
        if stretch.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": parts, "encrypted_content": None}
        return {**head, "type": "message", "role": "assistant", "content": parts}

    def part(self, stretch: Stretch, empty: bool = False) -> Fields:
        text = "" if empty else stretch.text
        if stretch.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        scores = () if empty else tuple(stretch.scores)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.scores(scores)}

    def scores(self, scores: Scores) -> list[Fields]:
        return [chat_entry(entry, self._spell, self._top) for entry in scores]
