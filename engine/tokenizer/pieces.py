"""The bytes of each token. Text is the bytes of its tokens in a row: nothing else has to be decoded again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum

from tokenizers import Tokenizer as Backend

_SPACE = "\u2581"  # how SentencePiece writes a space


class PieceKind(Enum):
    """How tokens spell bytes. OPAQUE: not known, such tokens can only be decoded by the library, in a row."""

    BYTE_LEVEL = "byte level"
    SENTENCEPIECE = "sentencepiece"
    OPAQUE = "opaque"


class Pieces:
    """Bytes by token id, remembered. `strip` is true where the first space of a text is not part of it.

    `known`: the text of tokens that the backend has under another name.
    """

    def __init__(self, backend: Backend, known: Mapping[int, str] | None = None) -> None:
        self._backend = backend
        self.kind, self.strip = _read_decoder(backend)
        self._known = {token_id: text.encode("utf-8") for token_id, text in (known or {}).items()}

    def of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id that is not in the vocabulary."""
        data = self._known.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            data = b"" if token is None else self._spell(token)
            if token is not None:
                self._known[token_id] = data
        return data

    def _spell(self, token: str) -> bytes:
        if self.kind is PieceKind.BYTE_LEVEL:
            try:
                return bytes([_BYTES[character] for character in token])
            except KeyError:
                return token.encode("utf-8")
        if self.kind is PieceKind.SENTENCEPIECE and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace(_SPACE, " ").encode("utf-8")


def _read_decoder(backend: Backend) -> tuple[PieceKind, bool]:
    """Recognize the two decoders that nearly all language models have; anything else is opaque."""
    if backend.decoder is None:
        return PieceKind.OPAQUE, False
    settings = json.loads(backend.decoder.__getstate__())
    steps = settings["decoders"] if settings["type"] == "Sequence" else [settings]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return PieceKind.BYTE_LEVEL, False
    strips = names[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0)
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and (strips or len(names) == 3):
        replace = steps[0]
        if replace["pattern"] == {"String": _SPACE} and replace["content"] == " ":
            return PieceKind.SENTENCEPIECE, strips
    return PieceKind.OPAQUE, False


def _byte_of_each_character() -> dict[str, int]:
    """The inverse of GPT-2's table: printable bytes stand for themselves, the others are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_each_character()
