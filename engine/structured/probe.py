"""The process that tries out grammars: a small child of the front process, which may kill it.

Grammars come from clients, and their compiler is native code: a long chain of references can overflow its stack, some
texts keep it busy for half a minute. So each one is tried here first, with a smaller stack, less memory and less time
than the engine process has; what passes is safe there. It reads `Words`, then `Ask` after `Ask`, and answers each.
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import IO

import msgspec
from llguidance import LLMatcher

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.structured.messages import TOO_COMPLEX, explain
from engine.structured.source import parser_limits, source
from engine.structured.vocabulary import Texts, Vocabulary
from engine.structured.wire import Answer, Ask, Words, receive, send

STACK = 2 << 20  # bytes; threads of the engine process have four times as much
MEMORY = 1 << 30  # bytes that a grammar may take beside what the process has at its start
MAX_NODES = 10_000  # values in a JSON schema
MAX_DEPTH = 64
MAX_STRING = 8192  # bytes of a name or a constant of a JSON schema
CPU_SECONDS = 4  # for a grammar
STEPS = 16  # tokens of a random answer
STEP_SECONDS = 0.25  # of the processor's time for a token
WALK_SECONDS = 1.0  # for all of them


def vocabulary(words: Words) -> Vocabulary:
    """Texts are cut into tokens greedily: which ones they become decides nothing here."""
    return Vocabulary(words.tokens, frozenset(words.special), words.eos, Texts(words.tokens))


def examine(grammar: Grammar, vocabulary: Vocabulary) -> str | None:
    """What is wrong with the grammar: it is invalid, not supported, can't be satisfied, or takes too much."""
    try:
        if grammar.kind == "json":
            _check_size(grammar.text)
        matcher = LLMatcher(vocabulary.handle, source(grammar), log_level=0, limits=parser_limits())
    except InvalidRequest as error:
        return error.message
    if matcher.is_error():
        return explain(matcher.get_error())
    first = matcher.deep_copy()
    if not any(first.compute_bitmask()) or first.is_error():
        return explain(first.get_error() or "NoExtension")
    for seed in range(2):
        problem = _walk(matcher.deep_copy(), random.Random(seed), vocabulary.ends)
        if problem is not None:
            return problem
    return None


def _walk(matcher: LLMatcher, rng: random.Random, ends: frozenset[int]) -> str | None:
    """Follow the grammar for some tokens drawn evenly: some can be compiled and not be followed."""
    began = time.thread_time()
    for _ in range(STEPS):
        before = time.thread_time()
        mask = matcher.compute_bitmask()
        now = time.thread_time()
        if matcher.is_error() or now - before > STEP_SECONDS or now - began > WALK_SECONDS:
            return TOO_COMPLEX
        token = _draw(mask, rng, ends)
        if token is None:
            return None
        if not matcher.consume_token(token):
            return TOO_COMPLEX
        if matcher.is_stopped():
            return None
    return None


def _draw(mask: bytes, rng: random.Random, ends: frozenset[int]) -> int | None:
    """A token that the mask allows and that does not end the answer."""
    start = rng.randrange(len(mask))
    for at in (*range(start, len(mask)), *range(start)):
        if mask[at]:
            for bit in range(8):
                token: int = at * 8 + bit
                if mask[at] & 1 << bit and token not in ends:
                    return token
    return None


def _check_size(text: str) -> None:
    """Raises InvalidRequest for a schema that is larger than any that can be meant."""
    try:
        level: list[object] = [msgspec.json.decode(text)]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"invalid JSON schema: {error}") from None
    nodes = 0
    for _ in range(MAX_DEPTH):
        nodes += len(level)
        names = [name for node in level if isinstance(node, dict) for name in node]
        texts = (text for text in (*names, *level) if isinstance(text, str))
        if any(len(text) * 4 > MAX_STRING and len(text.encode()) > MAX_STRING for text in texts):
            raise InvalidRequest(f"a text in it is longer than {MAX_STRING} bytes")
        if nodes > MAX_NODES:
            raise InvalidRequest(f"it holds more than {MAX_NODES} values")
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise InvalidRequest(f"it is nested deeper than {MAX_DEPTH} levels")


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def _limit_time() -> None:
    """The kernel ends the process that goes beyond it. Time that other processes take does not count."""
    soft = math.ceil(time.process_time()) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _work(words: Words, asked: SimpleQueue[Ask], stdout: IO[bytes]) -> None:
    known = vocabulary(words)
    if sys.platform == "linux":
        _limit_memory()
    send(stdout, Answer(None))
    while True:
        ask = asked.get()
        _limit_time()
        try:
            problem = examine(Grammar(ask.kind, ask.text), known)
        except Exception as error:  # whatever it is, it is about this text
            problem = f"it can't be used ({type(error).__name__})"
        send(stdout, Answer(problem))


def main() -> int:
    """Works on a thread with a small stack. The end of stdin ends the process at once, whatever is under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    words = receive(sys.stdin.buffer, Words)
    if words is None:
        return 0
    asked: SimpleQueue[Ask] = SimpleQueue()
    threading.stack_size(STACK)
    threading.Thread(target=_work, args=(words, asked, sys.stdout.buffer), daemon=True).start()
    while (ask := receive(sys.stdin.buffer, Ask)) is not None:
        asked.put(ask)
    os._exit(0)
