"""Choices as the two generation endpoints write them. Both implement `answers.Choices`."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import TokenEvent, TokenLogprob
from server.answers import Fields, finish_word
from server.convert import Job
from server.diffusion import canvas_fields
from server.fragments import Fragment, Parser, Plain, is_whole
from server.logprobs import CompletionLogprobs, Spelling, chat_entry, prompt_entry, prompt_offsets
from server.parts import deltas, message
from server.schemas import CompletionBody
from server.schemas_chat import ChatBody
from server.speculation import trace_fields


class CompletionChoices:
    """`text` choices; a chunk and a whole choice look the same. With echo, the prompt comes in the first piece."""

    kind = chunk_kind = "text_completion"

    def __init__(self, body: CompletionBody, job: Job) -> None:
        self._job = job
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs
        self._alternatives = len(job.requests[0].sampling.logprob_token_ids) or body.logprobs or 0
        self._prompt_logprobs = body.prompt_logprobs
        self._return_ids = bool(body.return_token_ids)
        self._spell = Spelling(job.engine.tokenizer, bool(body.return_tokens_as_token_ids))
        self._echoed: dict[int, str] = {}  # prompt texts by prompt, kept for offsets
        self._begun: set[int] = set()

    def opening(self, index: int) -> Fields | None:  # noqa: ARG002  as in the contract
        return None

    def extras(self, first: TokenEvent | None) -> Fields:  # noqa: ARG002  as in the contract
        return {}

    def whole(self, index: int, event: TokenEvent) -> Fields:
        choice = self._piece(index, event)
        assert choice is not None
        if self._prompt_logprobs is not None:
            scores, count = event.prompt_logprobs or (), self._prompt_logprobs
            choice["prompt_logprobs"] = [prompt_entry(entry, self._spell, count) for entry in scores]
        return choice

    def pieces(self, index: int, event: TokenEvent) -> Sequence[Fields]:
        choice = self._piece(index, event)
        return () if choice is None else (choice,)

    def _piece(self, index: int, event: TokenEvent) -> Fields | None:
        finish, shown = finish_word(event.finish), not self._job.score_only
        first = index not in self._begun
        wanted = self._return_ids or self._logprobs is not None or event.origins
        told = (wanted and event.token_ids) or event.canvas
        if not (event.text or finish or (first and self._echo) or told):
            return None
        self._begun.add(index)
        choice: Fields = {
            "index": index,
            "text": (self._prompt_text(index) if first else "") + (event.text if shown else ""),
            "logprobs": None if self._logprobs is None else self._scores(index, event, first),
            "finish_reason": finish if shown or finish is None else "length",
            "stop_reason": event.stop_reason if shown else None,
        }
        if self._return_ids:
            choice["prompt_token_ids"] = list(self._job.prompt_of(index).ids) if first else None
            choice["token_ids"] = list(event.token_ids) if shown else []
        if event.origins is not None and shown:
            choice["speculation"] = trace_fields(event, len(self._prompt_text(index)))
        if event.canvas:
            choice["diffusion"] = canvas_fields(event, self._spell.tokenizer)
        return choice

    def _prompt_text(self, index: int) -> str:
        """The text of the prompt if it is echoed, else nothing."""
        if not self._echo:
            return ""
        key, prompt = index // self._job.n, self._job.prompt_of(index)
        if key not in self._echoed:
            decode = self._job.engine.tokenizer.decode
            self._echoed[key] = decode(prompt.ids, skip_special_tokens=False) if prompt.text is None else prompt.text
        return self._echoed[key]

    def _scores(self, index: int, event: TokenEvent, first: bool) -> CompletionLogprobs:
        assert self._logprobs is not None
        scores, text = CompletionLogprobs(), self._prompt_text(index)
        if self._echo and first:
            ids = self._job.prompt_of(index).ids
            offsets = prompt_offsets(ids, text, self._spell.tokenizer)
            for token_id, offset, entry in zip(ids, offsets, event.prompt_logprobs or (), strict=True):
                if entry is None:
                    scores.add_unscored(token_id, offset, self._spell)
                else:
                    scores.add(entry, offset, self._spell, self._logprobs)
        if not self._job.score_only:
            for entry, offset in zip(event.logprobs or (), event.offsets, strict=True):
                scores.add(entry, len(text) + offset, self._spell, self._alternatives)
        return scores


class ChatChoices:
    """`message` choices, and `delta` choices in streams: content, reasoning and calls, as the job's manner reads them.

    What a stream says of an event may be several choices: the scores, ids and trace of its tokens stand in the first,
    whatever text is held back, and the end in the last.
    """

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, body: ChatBody, job: Job) -> None:
        self._prompt_ids = job.prompts[0].ids
        named = len(job.requests[0].sampling.logprob_token_ids)
        self._top = (named or body.top_logprobs or 0) if body.logprobs else None
        self._prompt_logprobs = body.prompt_logprobs
        self._return_ids = bool(body.return_token_ids)
        self._spell = Spelling(job.engine.tokenizer, bool(body.return_tokens_as_token_ids))
        self._manner = job.manner
        self._plain = isinstance(job.manner, Plain)
        self._parsers: dict[int, Parser] = {}
        self._calling: dict[int, list[str]] = {}  # the arguments of the last call of each choice that called a tool
        self._called = job.called

    def opening(self, index: int) -> Fields | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def extras(self, first: TokenEvent | None) -> Fields:
        fields: Fields = {"prompt_token_ids": list(self._prompt_ids)} if self._return_ids else {}
        if first is not None and self._prompt_logprobs is not None:
            scores, count = first.prompt_logprobs or (), self._prompt_logprobs
            fields["prompt_logprobs"] = [prompt_entry(entry, self._spell, count) for entry in scores]
        return fields

    def whole(self, index: int, event: TokenEvent) -> Fields:
        choice: Fields = {
            "index": index,
            "message": message(self._read(index, event)),
            "logprobs": self._scores(event.logprobs or ()),
            "finish_reason": self._finish(index, event),
            "stop_reason": event.stop_reason,
        }
        return choice | self._of_tokens(event)

    def pieces(self, index: int, event: TokenEvent) -> Sequence[Fields]:
        finish, wanted = finish_word(event.finish), self._return_ids or self._top is not None or event.origins
        if self._plain and finish is None and event.text and not (wanted or event.canvas):  # nearly all there are
            return ({"index": index, "delta": {"content": event.text}, "logprobs": None, "finish_reason": None},)
        found = deltas(self._read(index, event)) if event.text or finish else []
        if not found:
            if not (finish or (wanted and event.token_ids) or event.canvas):
                return ()
            found = [{} if finish else {"content": ""}]
        first: Fields = {"index": index, "delta": found[0], "logprobs": None, "finish_reason": None}
        choices = [first]
        for delta in found[1:]:
            choices.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        if self._top is not None and event.token_ids:
            first["logprobs"] = self._scores(event.logprobs or ())
        if finish is not None:
            choices[-1]["finish_reason"] = self._finish(index, event)
            choices[-1]["stop_reason"] = event.stop_reason
        if wanted or event.canvas:
            first |= self._of_tokens(event)
        return choices

    def _read(self, index: int, event: TokenEvent) -> list[Fragment]:
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = self._manner.parser()
        found = list(parser.feed(event.text))
        if event.finish is not None:
            found += parser.end()
        for fragment in found:
            if fragment.kind == "call":
                if fragment.id:
                    self._calling[index] = []
                self._calling[index].append(fragment.text)
        return found

    def _finish(self, index: int, event: TokenEvent) -> str | None:
        """A choice that called a tool says so, unless it was cut: also by a stop string in the middle of a call."""
        finish = finish_word(event.finish)
        if finish != "stop" or index not in self._calling:
            return finish
        return self._called if is_whole("".join(self._calling[index])) else finish

    def _of_tokens(self, event: TokenEvent) -> Fields:
        fields: Fields = {}
        if self._return_ids:
            fields["token_ids"] = list(event.token_ids)
        if event.origins is not None:
            fields["speculation"] = trace_fields(event)
        if event.canvas:
            fields["diffusion"] = canvas_fields(event, self._spell.tokenizer)
        return fields

    def _scores(self, entries: tuple[TokenLogprob, ...]) -> Fields | None:
        if self._top is None:
            return None
        return {"content": [chat_entry(entry, self._spell, self._top) for entry in entries], "refusal": None}
