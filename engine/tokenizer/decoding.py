"""Token ids to text, one at a time, such that the pieces add up to `Tokenizer.decode` of all ids."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from engine.tokenizer.pieces import PieceKind
from engine.tokenizer.tokenizer import Tokenizer

_MAX_PENDING = 16  # tokens without a whole character, for decoders whose bytes are not known
_WINDOW = 4  # tokens before, whose text decides about spaces


class IncrementalDecoder:
    """Holds back what is no whole character yet; `finish` gives it out as U+FFFD.

    `prompt_ids`: the tokens that the text continues. They matter only for the space that SentencePiece puts
    before the first word of a text, which is a real one when the text goes on. `shown`: special tokens that are
    text all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int] = (),
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._shown = frozenset(shown)
        self._opaque = tokenizer.pieces.kind is PieceKind.OPAQUE
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.pieces.strip and not any(self._visible(i) for i in prompt_ids)
        self._window = [i for i in prompt_ids[-_WINDOW:] if self._visible(i)] if self._opaque else []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if not self._visible(token_id):
            return ""
        if self._opaque:
            self._pending.append(token_id)
            return self._decode_pending(len(self._pending) >= _MAX_PENDING)
        return self._strip(self._utf8.decode(self._tokenizer.pieces.of(token_id)))

    def finish(self) -> str:
        """What was held back. Call it once, at the end."""
        if self._opaque:
            return self._decode_pending(True)
        return self._strip(self._utf8.decode(b"", final=True))

    def _visible(self, token_id: int) -> bool:
        return not (self._skip and self._tokenizer.is_special(token_id)) or token_id in self._shown

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text

    def _decode_pending(self, force: bool) -> str:
        """Decode the pending tokens behind a short window of earlier ones, and take the text that they add."""
        before = self._tokenizer.decode(self._window, skip_special_tokens=False)
        after = self._tokenizer.decode(self._window + self._pending, skip_special_tokens=False)
        if after.endswith("\ufffd") and not force:
            return ""
        self._window = (self._window + self._pending)[-_WINDOW:]
        self._pending = []
        return after[len(before) :]
