"""Log-probabilities in the shapes of the two endpoints and of vLLM's `prompt_logprobs`.

They are those of the raw logits, before temperature, penalties and bans. JSON has no infinity: -inf is -9999.0.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.types import TokenLogprob
from server.contract import Tokenizer

FLOOR = -9999.0


def finite(logprob: float) -> float:
    """The value as JSON can hold it; NaN too becomes the floor."""
    return logprob if logprob > FLOOR else FLOOR


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a token is named in answers: by its text, or as token_id:NNN, which no two tokens share."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


@dataclass(slots=True)
class CompletionLogprobs:
    """The four parallel arrays of /v1/completions."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add_unscored(self, token_id: int, offset: int, spell: Spelling) -> None:
        """The first token of an echoed prompt: nothing stands before it."""
        self.tokens.append(spell(token_id))
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(offset)

    def add(self, entry: TokenLogprob, offset: int, spell: Spelling, count: int) -> None:
        """The chosen token comes first and wins where two tokens have one text; then the `count` best."""
        chosen = spell(entry.token_id)
        best = {chosen: finite(entry.logprob)}
        for token_id, logprob in entry.top[:count]:
            best.setdefault(spell(token_id), finite(logprob))
        self.tokens.append(chosen)
        self.token_logprobs.append(best[chosen])
        self.top_logprobs.append(best)
        self.text_offset.append(offset)


def chat_entry(entry: TokenLogprob, spell: Spelling, count: int) -> dict[str, object]:
    """One element of `choices[].logprobs.content`. `bytes` of several tokens join to valid UTF-8."""

    def one(token_id: int, logprob: float) -> dict[str, object]:
        spelled = list(spell.tokenizer.token_bytes(token_id))
        return {"token": spell(token_id), "logprob": finite(logprob), "bytes": spelled}

    top = [one(token_id, logprob) for token_id, logprob in entry.top[:count]]
    return {**one(entry.token_id, entry.logprob), "top_logprobs": top}


def prompt_entry(entry: TokenLogprob | None, spell: Spelling, count: int) -> dict[str, object] | None:
    """vLLM's form: token id -> {logprob, rank, decoded_token}; the prompt's own token first."""
    if entry is None:
        return None
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token, logprob, i + 1) for i, (token, logprob) in enumerate(entry.top[:count])]
    found: dict[str, object] = {}
    for token_id, logprob, rank in ranked:
        fields = {"logprob": finite(logprob), "rank": rank, "decoded_token": spell.tokenizer.token_text(token_id)}
        found.setdefault(str(token_id), fields)
    return found


def prompt_offsets(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Where each prompt token starts in the echoed text, in characters.

    A token that starts within a character starts where that character does. Special tokens in front that the text
    does not show, and a first space that SentencePiece added, take no room.
    """
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    hidden = 0
    while hidden < len(ids) and tokenizer.is_special(ids[hidden]) and not text.startswith(pieces[hidden].decode()):
        hidden += 1
    shown = b"".join(pieces[hidden : hidden + 1])
    added_space = shown.startswith(b" ") and not text.startswith(" ")
    starts = (max(0, start - added_space) for start in _starts(pieces[hidden:]))
    return [0] * hidden + [min(start, len(text)) for start in starts]


def _starts(pieces: Iterable[bytes]) -> list[int]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    starts, length = [], 0
    for piece in pieces:
        starts.append(length)
        length += len(decoder.decode(piece))
    return starts
