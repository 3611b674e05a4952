"""A process that has one grammar library compile and follow what it is asked; `grammar_runs.py` starts it.

One JSON line for each job: {"kind", "text", "steps", "seed", "accept"}. It answers with the seconds of compiling and of
each mask, the text of a random answer, whether the answer came to its end, and which of the texts in "accept" the
grammar takes.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR
from engine.structured.source import parser_limits, source
from engine.structured.vocabulary import Vocabulary
from engine.structured.wire import Words
from engine.tokenizer.tokenizer import Tokenizer

Mask = npt.NDArray[np.int32]


class Refused(Exception):
    """The library says that it can't, or that the text is wrong."""


class Walk(Protocol):
    """Where one answer stands."""

    def mask(self, row: Mask) -> None: ...

    def accept(self, token: int) -> bool: ...

    def may_end(self) -> bool: ...


class Library(Protocol):
    def compile(self, grammar: Grammar) -> Callable[[], Walk]:
        """Raises Refused."""
        ...


class _Guidance:
    def __init__(self, tokenizer: Tokenizer, words: Words) -> None:
        self._handle = Vocabulary.of(tokenizer, len(words.tokens)).handle

    def compile(self, grammar: Grammar) -> Callable[[], Walk]:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._handle, source(grammar), log_level=0, limits=parser_limits())
        except InvalidRequest as error:
            raise Refused(error.message) from None
        if matcher.is_error():
            raise Refused(matcher.get_error())

        class Follow:
            def __init__(self) -> None:
                self._inner = matcher.deep_copy()

            def mask(self, row: Mask) -> None:
                self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
                if self._inner.is_error():
                    raise Refused(self._inner.get_error())

            def accept(self, token: int) -> bool:
                return self._inner.consume_token(token)

            def may_end(self) -> bool:
                return self._inner.is_accepting()

        return Follow


class _XGrammar:
    def __init__(self, words: Words) -> None:
        import xgrammar

        self._library = xgrammar
        special = set(words.special)
        tokens = [b"" if i in special else token for i, token in enumerate(words.tokens)]
        info = xgrammar.TokenizerInfo(tokens, vocab_size=len(tokens), stop_token_ids=list(words.eos))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> Callable[[], Walk]:
        make = self._library.GrammarMatcher
        try:
            if grammar.kind == "json":
                # strict_mode would forbid properties that are not listed, where JSON Schema allows them.
                # White space is bounded, as ours is: answers drawn at random would find no end.
                compiled = self._compiler.compile_json_schema(grammar.text, strict_mode=False, max_whitespace_cnt=1)
            elif grammar.kind == "regex":
                compiled = self._compiler.compile_regex(grammar.text)
            else:
                compiled = self._compiler.compile_lark(grammar.text)
        except (RuntimeError, ValueError, TypeError) as error:
            raise Refused(str(error)) from None

        class Follow:
            def __init__(self) -> None:
                self._inner = make(compiled)

            def mask(self, row: Mask) -> None:
                row.fill(-1)
                self._inner.fill_next_token_bitmask(row.reshape(1, -1))

            def accept(self, token: int) -> bool:
                return bool(self._inner.accept_token(token))

            def may_end(self) -> bool:
                return bool(self._inner.is_completed())

        return Follow


class _Outlines:
    def __init__(self, words: Words) -> None:
        import outlines_core

        special = set(words.special)
        found: dict[bytes, list[int]] = {}
        for i, token in enumerate(words.tokens):
            if i not in special and token:
                found.setdefault(token, []).append(i)
        self._library = outlines_core
        self._vocabulary = outlines_core.Vocabulary(words.eos[0], found)
        self._eos = words.eos[0]

    def compile(self, grammar: Grammar) -> Callable[[], Walk]:
        from outlines_core.json_schema import build_regex_from_schema

        library, eos = self._library, self._eos
        try:
            pattern = build_regex_from_schema(grammar.text) if grammar.kind == "json" else grammar.text
            if grammar.kind == "lark":
                raise Refused("regular languages only")
            index = library.Index(pattern, self._vocabulary)
        except (ValueError, TypeError) as error:
            raise Refused(str(error)) from None

        class Follow:
            def __init__(self) -> None:
                self._inner = library.Guide(index)

            def mask(self, row: Mask) -> None:
                bits = np.zeros(row.size * 32, dtype=np.uint8)
                bits[self._inner.get_tokens()] = 1
                row[:] = np.packbits(bits, bitorder="little").view(np.int32)

            def accept(self, token: int) -> bool:
                try:
                    self._inner.advance(token)
                except ValueError:
                    return False
                return True

            def may_end(self) -> bool:
                return eos in self._inner.get_tokens()

        return Follow


LIBRARIES: dict[str, Callable[[Tokenizer, Words], Library]] = {
    "llguidance": _Guidance,
    "xgrammar": lambda _, words: _XGrammar(words),
    "outlines_core": lambda _, words: _Outlines(words),
}


def answer(library: Library, job: dict[str, object], tokenizer: Tokenizer, words: Words) -> dict[str, object]:
    began = time.perf_counter()
    try:
        start = library.compile(Grammar(str(job["kind"]), str(job["text"])))
        walk = start()
    except Refused as error:
        return {"refused": str(error)[:300], "compile": time.perf_counter() - began}
    found: dict[str, object] = {"compile": time.perf_counter() - began}
    accept = job.get("accept") or []
    assert isinstance(accept, list)
    found["accepted"] = [_takes(start(), tokenizer.encode(text, add_special_tokens=False)) for text in accept]
    try:
        found |= _follow(walk, words, int(str(job["steps"])), random.Random(int(str(job.get("seed", 0)))))
    except Refused as error:
        found["stuck"] = str(error)[:300]
    return found


def _takes(walk: Walk, tokens: Sequence[int]) -> bool:
    return all(walk.accept(token) for token in tokens) and walk.may_end()


def _follow(walk: Walk, words: Words, steps: int, rng: random.Random) -> dict[str, object]:
    """An answer whose tokens are drawn evenly of those that the masks allow."""
    row = np.zeros((len(words.tokens) + 31) // 32, dtype=np.int32)
    ends, text, seconds, ended = set(words.eos), b"", [], False
    for _ in range(steps):
        began = time.perf_counter()
        walk.mask(row)
        seconds.append(time.perf_counter() - began)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        if not allowed.size:
            raise Refused("no token may come")
        token = int(rng.choice(allowed))
        if token in ends:
            ended = True
            break
        if not walk.accept(token):
            raise Refused("a token that the mask allows is not taken")
        text += words.tokens[token]
    return {"masks": seconds, "text": text.decode("utf-8", "replace"), "ended": ended}


def main() -> int:
    folder = resolve("demo", Path(CACHE_DIR).expanduser())
    tokenizer = Tokenizer.load(folder)
    words = Words.of(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    library = LIBRARIES[sys.argv[1]](tokenizer, words)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(library, json.loads(line), tokenizer, words)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
