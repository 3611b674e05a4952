"""The tokens that say an option's label at the start of a reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.contract import Tokenizer
from server.errors import ApiError

_TAIL = 32  # tokens of a prompt that may decide how a label behind it is written


def tail_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text at the end of a prompt behind its last special token, or the end of that."""
    tail = list(ids[-_TAIL:])
    for place in range(len(tail) - 1, -1, -1):
        if tokenizer.is_special(tail[place]):
            tail = tail[place + 1 :]
            break
    return tokenizer.decode(tail, skip_special_tokens=False)


class Labels:
    """How a tokenizer writes labels behind a text. A label may count in several forms: A, and A behind a space.

    Of a tokenizer that has no token for a word, as one of bytes, the word's first token says it.
    """

    def __init__(self, tokenizer: Tokenizer, tail: str) -> None:
        self._tokenizer = tokenizer
        self._tail = tail
        self._base = self._encode(tail)
        self._known: dict[str, int | None] = {}

    def groups(self, labels: Sequence[str], param: str) -> list[tuple[int, ...]]:
        """The tokens of each label, none of which says two of them.

        Raises ApiError where the tokenizer has no token for one.
        """
        found: list[tuple[int, ...]] = []
        taken: set[int] = set()
        for label in labels:
            whole = [id_ for form in _forms(label) if (id_ := self._token(form)) is not None]
            found_ids = whole or [self._first(form) for form in _forms(label) if not form.startswith(" ")]
            ids = tuple(id_ for id_ in dict.fromkeys(found_ids) if id_ not in taken)
            if not ids:
                message = f"This model can't be asked: its tokenizer has no token of its own for the answer '{label}'."
                raise ApiError(400, message, param=param, code="unsupported_model")
            taken.update(ids)
            found.append(ids)
        return found

    def _token(self, form: str) -> int | None:
        """The one token that a form adds behind the text, or that it is by itself."""
        if form not in self._known:
            behind, alone = self._encode(self._tail + form), self._encode(form)
            fits = len(behind) == len(self._base) + 1 and behind[:-1] == self._base
            self._known[form] = behind[-1] if fits else alone[0] if len(alone) == 1 else None
        return self._known[form]

    def _first(self, form: str) -> int:
        behind = self._encode(self._tail + form)
        fits = len(behind) > len(self._base) and behind[: len(self._base)] == self._base
        return behind[len(self._base)] if fits else self._encode(form)[0]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _forms(label: str) -> Iterator[str]:
    words = (label, label.capitalize(), label.upper()) if len(label) > 1 else (label,)
    for word in words:
        yield word
        yield f" {word}"
