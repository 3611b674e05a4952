"""A model's tokens as the grammar engine reads them: the bytes of each, which are special, which end an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer, TokenizerWrapper

from engine.errors import InvalidRequest
from engine.tokenizer.pieces import PieceKind
from engine.tokenizer.tokenizer import Tokenizer

Mask = npt.NDArray[np.uint32]  # [words]: bit i % 32 of word i // 32 says whether token i may come

_SPECIAL = b"\xff"  # how the library marks special tokens: no text begins with this byte
_LONGEST = 24  # bytes of a token that is looked for where texts are cut greedily
_BEFORE = "\n"  # put before a text where tokenizers write a space before the first word


class Vocabulary:
    """The tokens that an answer may be made of. Immutable; use it from any number of threads.

    `size` is the smaller one of the tokenizer's vocabulary and the model's: masks end there, and logits behind it are
    those of no token. `eos_ids` end an answer, and are never part of its text.
    """

    def __init__(self, tokens: Sequence[bytes], special: frozenset[int], eos_ids: Sequence[int], text: Texts) -> None:
        """`tokens`: the bytes of each id; `text` encodes. Raises InvalidRequest where no id ends an answer."""
        self.size = len(tokens)
        self.eos_ids = tuple(token for token in dict.fromkeys(eos_ids) if 0 <= token < self.size)
        if not self.eos_ids:
            raise InvalidRequest("This model has no end-of-sequence token: structured output could not end.")
        self.ends = frozenset(self.eos_ids)
        special = special | self.ends
        clean = [data if token in special or data[:1] != _SPECIAL else b"" for token, data in enumerate(tokens)]
        source = _Source(clean, sorted(special), self.eos_ids[0], text)
        self.handle = LLTokenizer(TokenizerWrapper(source), eos_token=list(self.eos_ids))
        self.words = (self.size + 31) // 32
        self.unbound = self._without_ends()

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int] | None = None) -> Vocabulary:
        """That of a model with logits for `vocab_size` tokens. `eos_ids`: None for the tokenizer's own.

        Takes about 0.2 s for 50,000 tokens. Raises InvalidRequest for tokenizers whose tokens' bytes are not known, and
        where no token ends an answer.
        """
        if tokenizer.pieces.kind is PieceKind.OPAQUE:
            raise InvalidRequest("Structured output is not supported for this model's tokenizer.")
        size = min(tokenizer.vocab_size, vocab_size)
        tokens = [tokenizer.token_bytes(token) for token in range(size)]
        special = frozenset(token for token in range(size) if tokenizer.is_special(token))
        return cls(tokens, special, tokenizer.eos_ids if eos_ids is None else eos_ids, Texts(tokens, tokenizer))

    def _without_ends(self) -> Mask:
        """Anything but the end of the answer."""
        bits = np.zeros(32 * self.words, dtype=np.uint8)
        bits[: self.size] = 1
        bits[list(self.eos_ids)] = 0
        mask = np.packbits(bits, bitorder="little").view(np.uint32)
        mask.setflags(write=False)
        return mask


class Texts:
    """Text to the ids that spell exactly its bytes, as the library asks for where a grammar forces a text.

    A tokenizer may write a space before the first word, or know ids that a model has no logits for: then the longest
    tokens that fit are taken.
    """

    def __init__(self, tokens: Sequence[bytes], tokenizer: Tokenizer | None = None) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._ids: dict[bytes, int] = {}
        for token, data in enumerate(tokens):
            if data and not (tokenizer is not None and tokenizer.is_special(token)):
                self._ids.setdefault(data, token)
        self._longest = min(_LONGEST, max(map(len, self._ids), default=0))

    def encode(self, data: bytes) -> list[int]:
        """Ids whose bytes are `data`, or a beginning of it where no token goes on."""
        if self._tokenizer is not None:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                return self._greedy(data)
            for before in ("", _BEFORE):
                ids = self._behind(before, text, data, self._tokenizer)
                if ids is not None:
                    return ids
        return self._greedy(data)

    def _behind(self, before: str, text: str, data: bytes, tokenizer: Tokenizer) -> list[int] | None:
        """The ids of `text` where it follows `before`; None where they do not spell `data`."""
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        if before:
            head = tokenizer.encode(before, add_special_tokens=False)
            if ids[: len(head)] != head:
                return None
            ids = ids[len(head) :]
        known = all(token < len(self._tokens) and not tokenizer.is_special(token) for token in ids)
        return ids if known and b"".join(self._tokens[token] for token in ids) == data else None

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[start:end]])
            start = end
        return ids


class _Source:
    """What `TokenizerWrapper` wants of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos_id: int, text: Texts) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_id
        self._text = text

    def __call__(self, data: bytes) -> list[int]:
        return self._text.encode(data)
