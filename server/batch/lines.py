"""The input of a batch: one request a line, in the form of OpenAI's Batch API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from server.body import parse_json
from server.errors import ApiError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINE = 16 << 20  # bytes, as a server's body
MAX_ID = 512  # characters


@dataclass(frozen=True, slots=True)
class Task:
    """A request to send. `body` is JSON as the client has written it, but for white space."""

    custom_id: str
    url: str
    body: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request. `custom_id` is None where it could not be read."""

    custom_id: str | None
    code: str
    message: str


def count(path: Path) -> int:
    """Lines of a file."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def read(path: Path) -> Iterator[Task | BadLine]:
    """Every line that is not empty. A bad one never ends it; OSError does."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if line is not None and not line.strip():
                continue
            yield _parsed(line, number, seen)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None in place of one that is too long to be kept."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield None
        else:
            yield line


def _parsed(line: bytes | None, number: int, seen: set[str]) -> Task | BadLine:
    if line is None:
        return BadLine(None, "line_too_long", f"line {number} is longer than {MAX_LINE} bytes")
    try:
        fields = parse_json(line)
    except ApiError as error:
        return BadLine(None, "invalid_json", f"line {number}: {error.detail.replace('The request body', 'the line')}")
    if not isinstance(fields, dict):
        return BadLine(None, "invalid_line", f"line {number} is not a JSON object")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID:
        return BadLine(
            None, "invalid_custom_id", f"line {number}: custom_id must be a string of 1 to {MAX_ID} characters"
        )
    if custom_id in seen:
        return BadLine(custom_id, "duplicate_custom_id", f"line {number}: this custom_id stands in an earlier line")
    seen.add(custom_id)
    problem = _problem(fields)
    if problem is not None:
        return BadLine(custom_id, problem[0], f"line {number}: {problem[1]}")
    return Task(custom_id, str(fields["url"]), fields["body"])


def _problem(fields: Mapping[str, object]) -> tuple[str, str] | None:
    """The code and the message of what is wrong with a line that has an id."""
    body, url = fields.get("body"), fields.get("url")
    if fields.get("method", "POST") != "POST":
        return "invalid_method", "method must be POST"
    if url not in URLS:
        return "invalid_url", f"url must be one of {', '.join(URLS)}"
    if not isinstance(body, dict):
        return "invalid_body", "body must be an object"
    if body.get("stream"):
        return "invalid_body", "a batch has no streams: leave out body.stream"
    return None
