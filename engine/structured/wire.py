"""What the front process and the process that tries out grammars say to each other, over a pair of pipes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import IO, TypeVar

import msgspec

from engine.errors import InvalidRequest
from engine.tokenizer.pieces import PieceKind
from engine.tokenizer.tokenizer import Tokenizer

M = TypeVar("M", bound=msgspec.Struct)


class Words(msgspec.Struct, frozen=True):
    """A vocabulary: the bytes of each token, and which tokens are no text."""

    tokens: list[bytes]
    special: list[int]
    eos: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> Words:
        """That of a model with logits for `vocab_size` tokens. Raises InvalidRequest where answers can't be shaped."""
        if tokenizer.pieces.kind is PieceKind.OPAQUE:
            raise InvalidRequest("Structured output is not supported for this model's tokenizer.")
        size = range(min(tokenizer.vocab_size, vocab_size))
        eos = [token for token in dict.fromkeys(eos_ids) if token in size]
        if not eos:
            raise InvalidRequest("This model has no end-of-sequence token: structured output could not end.")
        tokens = [tokenizer.token_bytes(token) for token in size]
        return cls(tokens, [token for token in size if tokenizer.is_special(token)], eos)


class Ask(msgspec.Struct, frozen=True):
    kind: str
    text: str


class Answer(msgspec.Struct, frozen=True):
    """What is wrong with a grammar, as a client reads it; None: nothing."""

    problem: str | None


def send(pipe: IO[bytes], message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(struct.pack("<I", len(data)) + data)
    pipe.flush()


def receive(pipe: IO[bytes], kind: type[M]) -> M | None:
    """The next message; None where the pipe ends, be it in the middle of one."""
    head = pipe.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack("<I", head)[0]
    data = pipe.read(size)
    if len(data) < size:
        return None
    return msgspec.msgpack.decode(data, type=kind)
