"""The events of a streamed response, in OpenAI's order; each has a `sequence_number`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from server.errors import ApiError
from server.parts import Fields
from server.responses.items import new_id
from server.responses.shape import Draft, Writer, error_fields, usage_fields
from server.stretches import Ending, Scores, Stretch

STATUS = {"stop": "completed", "length": "incomplete", None: "cancelled"}
NAMES = {"completed": "completed", "incomplete": "incomplete", "cancelled": "incomplete"}
PREFIX = {"content": "msg", "reasoning": "rs", "call": "fc"}


class ResponseEvents:
    """A `stretches.Dialect`: stretches are output items. `keep` gets the response once it has ended, well or not."""

    def __init__(self, draft: Draft, writer: Writer, keep: Callable[[Fields], None]) -> None:
        self._draft = draft
        self._writer = writer
        self._keep = keep
        self._number = -1
        self._id = ""  # of the open item

    def begun(self) -> Iterator[Fields]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._draft.fields())

    def opened(self, stretch: Stretch) -> Iterator[Fields]:
        self._id = new_id(PREFIX[stretch.kind])
        item = self._writer.item(self._id, stretch, "in_progress")
        yield self._event("response.output_item.added", output_index=stretch.place, item=item)
        if stretch.kind != "call":
            part = self._writer.part(stretch, empty=True)
            yield self._of_part("response.content_part.added", stretch, part=part)

    def grown(self, stretch: Stretch, text: str, scores: Scores) -> Iterator[Fields]:
        match stretch.kind:
            case "call":
                yield self._of_item("response.function_call_arguments.delta", stretch, delta=text)
            case "reasoning":
                yield self._of_part("response.reasoning_text.delta", stretch, delta=text)
            case _:
                told = self._writer.scores(scores)
                yield self._of_part("response.output_text.delta", stretch, delta=text, logprobs=told)

    def closed(self, stretch: Stretch, cut: bool) -> Iterator[Fields]:
        match stretch.kind:
            case "call":
                done = {"name": stretch.name, "arguments": stretch.text}
                yield self._of_item("response.function_call_arguments.done", stretch, **done)
            case "reasoning":
                yield self._of_part("response.reasoning_text.done", stretch, text=stretch.text)
            case _:
                told = self._writer.scores(tuple(stretch.scores))
                yield self._of_part("response.output_text.done", stretch, text=stretch.text, logprobs=told)
        if stretch.kind != "call":
            yield self._of_part("response.content_part.done", stretch, part=self._writer.part(stretch))
        item = self._writer.item(self._id, stretch, "incomplete" if cut else "completed")
        self._draft.output.append(item)
        yield self._event("response.output_item.done", output_index=stretch.place, item=item)

    def ended(self, ending: Ending) -> Iterator[Fields]:
        draft = self._draft
        draft.status, draft.usage, draft.reports = STATUS[ending.finish], usage_fields(ending.usage), ending.reports
        response = draft.fields()
        self._keep(response)
        yield self._event(f"response.{NAMES[draft.status]}", response=response)

    def failed(self, error: ApiError) -> Iterator[Fields]:
        self._draft.status, self._draft.error = "failed", error_fields(error)
        response = self._draft.fields()
        self._keep(response)
        yield self._event("error", code=error.code, message=error.detail, param=error.param)
        yield self._event("response.failed", response=response)

    def answer(self) -> Fields:
        return self._draft.fields()

    def _of_part(self, kind: str, stretch: Stretch, **fields: object) -> Fields:
        return self._of_item(kind, stretch, content_index=0, **fields)

    def _of_item(self, kind: str, stretch: Stretch, **fields: object) -> Fields:
        return self._event(kind, item_id=self._id, output_index=stretch.place, **fields)

    def _event(self, kind: str, **fields: object) -> Fields:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}
