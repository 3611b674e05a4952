"""A worker's grammars: compiled ahead of their requests, and kept for those that come with the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from engine.grammar import Grammar
from engine.structured.matcher import Matcher
from engine.structured.state import GrammarState
from engine.structured.vocabulary import Vocabulary
from engine.tokenizer.tokenizer import Tokenizer

# Compiled grammars that are kept; those that were not used for longest go first. One takes up to 60 MB.
KEPT = 16
KEPT_TEXT = 1 << 20  # characters of their texts together


class Grammars:
    """Any thread may call. Nothing is read or built before the first grammar comes: plain serving pays nothing."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """`folder` has the tokenizer; `vocab_size`: tokens that the model has logits for."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[tuple[str, str], Matcher] = OrderedDict()
        self._loading = threading.Lock()
        self._table = threading.Lock()

    def prepare(self, grammar: Grammar) -> Matcher:
        """Compile it, if it is not kept. Raises InvalidRequest."""
        key = grammar.kind, grammar.text
        with self._table:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = Matcher.compile(grammar, self.vocabulary())
        with self._table:
            made = self._kept.setdefault(key, made)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT or (len(self._kept) > 1 and self._text() > KEPT_TEXT):
                self._kept.popitem(last=False)
        return made

    def _text(self) -> int:
        return sum(len(text) for _, text in self._kept)

    def state(self, grammar: Grammar) -> GrammarState:
        """A request's own, at the beginning of its answer; at once where the grammar was prepared."""
        return GrammarState(self.prepare(grammar), self.vocabulary(), grammar.after, grammar.begin)

    def vocabulary(self) -> Vocabulary:
        """Raises InvalidRequest, see `Vocabulary.of`."""
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary.of(Tokenizer.load(self._folder), self._vocab_size)
            return self._vocabulary
