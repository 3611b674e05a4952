"""A way in which models write calls. One file each, and one line in `forms.FORMS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from server.fragments import Parser
from server.tools.calls import Offer
from server.tools.grammar import Shape

Written = tuple[str, str]  # a function's name and its arguments as JSON


class Form(Protocol):
    @property
    def marks(self) -> tuple[str, ...]:
        """Texts around calls; the first one begins them. Where a model has special tokens for them, they are shown."""
        ...

    @property
    def instructions(self) -> str:
        """How to call a function, for models whose templates do not tell them."""
        ...

    def parser(self, offer: Offer) -> Parser: ...

    def grammar(self, shape: Shape) -> str:
        """Lark of the answers that `shape` allows."""
        ...

    def written(self, calls: Sequence[Written]) -> str:
        """Calls of an earlier turn as the model would have written them."""
        ...
