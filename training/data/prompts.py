"""Where prompts come from: JSON-lines files, ShareGPT conversations, and templates of our own."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import BinaryIO

from engine.errors import ConfigError
from training.templates import code, mathematics

TEMPLATES = {"mathematics": mathematics.prompt, "code": code.prompt}
RUN = 8  # words in a row that make two prompts the same


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message, and the source that it came from."""

    text: str
    kind: str


def collect(sources: Sequence[str], count: int, excluded: Sequence[Path], seed: int) -> list[Prompt]:
    """`count` prompts of all sources in turn, each source shuffled; fewer where they run out.

    A source is a file, or the name of a template set. Prompts that share a run of 8 words with one of the `excluded`
    files are left out: those are kept for evaluation. Raises ConfigError.
    """
    kept_out = {run for path in excluded for text in _texts(path) for run in _runs(text)}
    streams = [_shuffled(source, seed + number) for number, source in enumerate(sources)]
    found: list[Prompt] = []
    seen: set[str] = set()
    while streams and len(found) < count:
        for stream in list(streams):
            prompt = next(stream, None)
            if prompt is None:
                streams.remove(stream)
            elif prompt.text not in seen and kept_out.isdisjoint(_runs(prompt.text)):
                seen.add(prompt.text)
                found.append(prompt)
    return found[:count]


def _shuffled(source: str, seed: int) -> Iterator[Prompt]:
    random = Random(seed)
    if source in TEMPLATES:
        while True:
            yield Prompt(TEMPLATES[source](random), source)
    texts = list(dict.fromkeys(_texts(Path(source))))
    random.shuffle(texts)
    yield from (Prompt(text, Path(source).stem) for text in texts)


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1)))


def _texts(path: Path) -> Iterator[str]:
    """First user messages of a file: JSON lines with "prompt", "messages" or "turns", or a ShareGPT array."""
    if not path.is_file():
        known = ", ".join(sorted(TEMPLATES))
        raise ConfigError(f"--prompts {path}: there is no such file, and no templates of that name ({known})")
    with path.open("rb") as file:
        first = file.read(1)
        file.seek(0)
        items: Iterable[object] = whole_items(file) if first == b"[" else map(_line, file)
        for item in items:
            text = _first_message(item)
            if text:
                yield text


def _line(line: bytes) -> object:
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        raise ConfigError(f"a line is no JSON: {line[:60]!r}") from error


def _first_message(item: object) -> str:
    """The text of one entry; empty where it has none."""
    if not isinstance(item, dict):
        return ""
    if isinstance(item.get("prompt"), str):
        return str(item["prompt"]).strip()
    turns = item.get("messages") or item.get("conversations") or item.get("turns")
    if not isinstance(turns, list) or not turns:
        return ""
    first = turns[0]
    if isinstance(first, str):
        return first.strip()
    if not isinstance(first, dict) or first.get("role", first.get("from")) not in ("user", "human"):
        return ""
    text = first.get("content", first.get("value"))
    return text.strip() if isinstance(text, str) else ""


def whole_items(file: BinaryIO, block: int = 1 << 20) -> Iterator[object]:
    """The items of a JSON array, read as a stream: a file that was cut off gives all that are whole."""
    decoder, utf8, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")(errors="ignore"), ""
    while data := file.read(block):
        text += utf8.decode(data)
        place = 0
        while True:
            while place < len(text) and text[place] in " \t\r\n,[":
                place += 1
            try:
                item, place = decoder.raw_decode(text, place)
            except ValueError:  # it goes on in the next block, or never
                break
            yield item
        text = text[place:]
