"""Server-sent events out of bytes cut anywhere, and answers out of events, of completions and of chats."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from benchmarks.stream import AnswerReader, EventSplitter, RequestFailed, Timing

STREAM = 'data: {"a": "é🙂"}\r\n\r\n: keep-alive\n\nevent: x\rdata:two\rdata: lines\r\rid: 4\n\n'.encode()
STREAM += b"data: a\r\ndata: b\r\n\r\ndata: [DONE]\n\n"
EVENTS = ['{"a": "é🙂"}'.encode(), b"two\nlines", b"a\nb", b"[DONE]"]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_do_not_depend_on_how_the_bytes_are_cut(size: int) -> None:
    splitter = EventSplitter()
    assert [event for piece in pieces(STREAM, size) for event in splitter.feed(piece)] == EVENTS


def test_every_single_cut_gives_the_same_events() -> None:
    for cut in range(len(STREAM)):
        splitter = EventSplitter()
        assert splitter.feed(STREAM[:cut]) + splitter.feed(STREAM[cut:]) == EVENTS, cut


@pytest.mark.parametrize(
    ("rest", "last"),
    [
        (b"data: [DONE]", [b"[DONE]"]),
        (b"data: [DONE]\r", [b"[DONE]"]),
        (b"data: [DONE]\n", [b"[DONE]"]),
        (b"data: x\n", []),
    ],
)
def test_only_the_closing_event_may_lack_its_blank_line(rest: bytes, last: list[bytes]) -> None:
    splitter = EventSplitter()
    assert splitter.feed(rest) == [] and splitter.last() == last


def sse(*items: object) -> bytes:
    return b"".join(b"data: " + (i if isinstance(i, bytes) else json.dumps(i).encode()) + b"\n\n" for i in items)


def text(content: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": content, "finish_reason": reason}]}


def delta(**fields: str | None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields}]}


def read(*data: bytes) -> AnswerReader:
    reader = AnswerReader()
    for at, piece in enumerate(data):
        reader.feed(at, piece)
    reader.close()
    return reader


def test_a_chat_is_read_with_its_thoughts() -> None:
    parts = [
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(reasoning="h"),
        delta(content="a"),
    ]
    reader = read(
        *map(sse, parts),
        sse(delta(), {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}, b"[DONE]"),
    )
    assert [chunk.text for chunk in reader.chunks] == ["", "hm", "h", "a", ""]
    assert [chunk.at for chunk in reader.chunks] == [0, 1, 2, 3, 4]
    timing = Timing(0.0, 5.0, tuple(reader.chunks), 1, 3)
    assert (timing.first_token, timing.gaps, timing.per_token) == (1.0, [1, 1], 1.0)


def test_a_stream_is_whole_with_done_or_with_a_reason_for_its_end() -> None:
    assert len(read(sse(text("a"), b"[DONE]")).chunks) == 1
    assert len(read(sse(text("a"), text("b", "stop"))).chunks) == 2
    assert read(sse(text("a"), b"[DONE]", b"not looked at")).usage is None


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (sse(text("a")), "cut"),
        (sse(text("a"), text("b"))[:-2], "cut"),
        (sse(b"[DONE]"), "cut"),
        (b"", "cut"),
        (sse(text("a"), b"{]"), "malformed"),
        (sse(text("a"), b"[1]"), "malformed"),
        (sse(text("a"), {"error": {"message": "out of luck"}}), "error_event"),
        (sse(text("a"), {"error": "out of luck"}), "error_event"),
    ],
)
def test_what_goes_wrong_has_a_name(data: bytes, kind: str) -> None:
    with pytest.raises(RequestFailed) as failed:
        read(data)
    assert failed.value.kind == kind


@pytest.mark.parametrize("texts", [(), ("a",), ("", "")])
def test_an_answer_of_one_piece_has_no_time_per_token(texts: tuple[str, ...]) -> None:
    reader = read(sse(*map(text, texts), text("", "length")))
    timing = Timing(0.0, 1.0, tuple(reader.chunks), 1, 5)
    assert timing.per_token is None and timing.gaps == []
