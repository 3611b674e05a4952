"""Choices as the two generation endpoints write them. Both implement `answers.Choices`."""

from __future__ import annotations

from engine.types import TokenEvent, TokenLogprob
from server.answers import Fields, finish_word
from server.convert import Job
from server.logprobs import CompletionLogprobs, Spelling, chat_entry, prompt_entry, prompt_offsets
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
        choice = self.piece(index, event)
        assert choice is not None
        if self._prompt_logprobs is not None:
            scores, count = event.prompt_logprobs or (), self._prompt_logprobs
            choice["prompt_logprobs"] = [prompt_entry(entry, self._spell, count) for entry in scores]
        return choice

    def piece(self, index: int, event: TokenEvent) -> Fields | None:
        finish, shown = finish_word(event.finish), not self._job.score_only
        first = index not in self._begun
        wanted = self._return_ids or self._logprobs is not None or event.origins
        if not (event.text or finish or (first and self._echo) or (wanted and event.token_ids)):
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
                scores.add(entry, len(text) + offset, self._spell, self._logprobs)
        return scores


class ChatChoices:
    """`message` choices, and `delta` choices in streams."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, body: ChatBody, job: Job) -> None:
        self._prompt_ids = job.prompts[0].ids
        self._top = (body.top_logprobs or 0) if body.logprobs else None
        self._prompt_logprobs = body.prompt_logprobs
        self._return_ids = bool(body.return_token_ids)
        self._spell = Spelling(job.engine.tokenizer, bool(body.return_tokens_as_token_ids))

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
            "message": {"role": "assistant", "content": event.text, "refusal": None},
            "logprobs": self._scores(event.logprobs or ()),
            "finish_reason": finish_word(event.finish),
            "stop_reason": event.stop_reason,
        }
        if self._return_ids:
            choice["token_ids"] = list(event.token_ids)
        if event.origins is not None:
            choice["speculation"] = trace_fields(event)
        return choice

    def piece(self, index: int, event: TokenEvent) -> Fields | None:
        finish, wanted = finish_word(event.finish), self._return_ids or self._top is not None or event.origins
        if not (event.text or finish or (wanted and event.token_ids)):
            return None
        choice: Fields = {
            "index": index,
            "delta": {"content": event.text} if event.text or not finish else {},
            "logprobs": self._scores(event.logprobs or ()) if event.token_ids else None,
            "finish_reason": finish,
        }
        if finish is not None:
            choice["stop_reason"] = event.stop_reason
        if self._return_ids:
            choice["token_ids"] = list(event.token_ids)
        if event.origins is not None:
            choice["speculation"] = trace_fields(event)
        return choice

    def _scores(self, entries: tuple[TokenLogprob, ...]) -> Fields | None:
        if self._top is None:
            return None
        return {"content": [chat_entry(entry, self._spell, self._top) for entry in entries], "refusal": None}
