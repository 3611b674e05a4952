"""`--show-drafts`: each character under the mark of its token, in colours or letters, and what drafting did."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cli import main
from server.draft_view import ORIGINS, WIDTH, DraftView, Report, Trace, legend
from tests.server.test_client import DONE, Upstream, upstream

__all__ = ["upstream"]

PIECES = [
    ("Hello", Trace("p", [0])),
    (", w", Trace("ddc", [5, 6, 7])),
    ("", Trace("c", [8])),  # half a character
    ("örld!", Trace("ddddb", [8, 9, 10, 11, 12])),
    ("", Trace("d", [13])),  # the end of the sequence
]
REPORT = Report(4, 16, 7, [1, 0, 2, 1])
GREEN, YELLOW, CYAN, DIM, OFF = "\x1b[32m", "\x1b[33m", "\x1b[36m", "\x1b[2m", "\x1b[0m"
SUMMARY = [
    "[11 tokens: 7 drafted, 2 corrected, 1 bonus, 1 plain]",
    "[4 rounds of 2.75 tokens; 7 of 16 drafted tokens accepted, 44%; "
    "rounds by tokens accepted: 0: 1  1: 0  2: 2  3: 1]",
]


def shown(view: DraftView, pieces: Sequence[tuple[str, Trace | None]], report: Report | None = None) -> str:
    return "".join([*(view.show(text, trace) for text, trace in pieces), view.close(report)])


def test_colours() -> None:
    view = DraftView(colours=True)
    assert [view.show(text, trace) for text, trace in PIECES] == [
        "Hello",
        f"{GREEN}, {OFF}{YELLOW}w{OFF}",
        "",
        f"{GREEN}örld{OFF}{CYAN}!{OFF}",
        "",
    ]
    assert view.close(REPORT) == "\n" + "\n".join(f"{DIM}{line}{OFF}" for line in SUMMARY)


def test_letters_stand_under_the_first_character_of_each_token() -> None:
    lines = shown(DraftView(colours=False), PIECES, REPORT).split("\n")
    assert lines == [
        "Hello, wörld!",
        "p    ddcddddb",
        *SUMMARY,
    ]


@pytest.mark.parametrize("decoder", ["relaxed", "relaxed_greedy", "of a later version"])
def test_a_lossy_answer_says_so(decoder: str) -> None:
    line = "[lossy: under ensemble the law of a token was 1.25% away from the model's own, on average]"
    if decoder == "relaxed_greedy":
        line = "[lossy: under ensemble, 1.25% of the tokens are not the model's first choice]"
    lossy = Report(4, 16, 7, [1, 0, 2, 1], "ensemble", True, decoder, 0.0125)
    assert shown(DraftView(colours=False), PIECES, lossy).split("\n")[-3:] == [*SUMMARY, line]


def test_letters_of_wide_and_combining_characters_and_of_lines() -> None:
    pieces = [
        ("日本", Trace("db", [0, 1])),
        ("e\u0301x\n\n", Trace("cd", [2, 4])),
        ("\ty", Trace("c", [7])),
    ]
    assert shown(DraftView(colours=False), pieces).split("\n")[:5] == ["日本e\u0301x", "d b cd", "", " " * 8 + "y", "c"]


def test_long_lines_are_broken() -> None:
    lines = shown(DraftView(colours=False), [("a" * (WIDTH + 5), Trace("pd", [0, WIDTH + 1]))]).split("\n")
    assert lines[:4] == ["a" * WIDTH, "p", "a" * 5, " d"]


def test_a_server_that_tells_nothing() -> None:
    for colours in (False, True):
        text = re.sub(r"\x1b\[\d*m", "", shown(DraftView(colours), [("plain", None)]))
        assert text == "plain\n[this server does not tell where its tokens come from]"


def test_rounds_are_left_out_where_there_were_none() -> None:
    text = shown(DraftView(colours=False), [("ab", Trace("pp", [0, 1]))], Report())
    assert text == "ab\npp\n[2 tokens: 0 drafted, 0 corrected, 0 bonus, 2 plain]"


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[tuple[str, Trace | None]], list[str]]:
    """An answer in chunks, each with the tokens that it tells of, and the origin of each of its characters."""
    texts = draw(st.lists(st.text("ab 日\n", max_size=3), max_size=8))
    origins = [draw(st.sampled_from("dcbp")) for _ in texts]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    owners = [origin for text, origin in zip(texts, origins, strict=True) for _ in text]
    whole, pieces, at, told = "".join(texts), [], 0, 0
    while told < len(texts):
        upto = draw(st.integers(told + 1, len(texts)))
        known = offsets[upto] if upto < len(texts) else len(whole)
        end = draw(st.integers(at, known))  # the text may lag behind
        pieces.append((whole[at:end], Trace("".join(origins[told:upto]), offsets[told:upto])))
        at, told = end, upto
    return [*pieces, (whole[at:], None)], owners


@given(streams())
def test_every_character_gets_the_colour_of_its_token(case: tuple[list[tuple[str, Trace | None]], list[str]]) -> None:
    pieces, owners = case
    view = DraftView(colours=True)
    painted = "".join(view.show(text, trace) for text, trace in pieces)
    found = []
    for code, coloured, plain in re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m|([^\x1b])", painted):
        origin = next(letter for letter, (*_, colour) in ORIGINS.items() if colour == code)
        found += [origin] * len(coloured or plain)
    assert re.sub(r"\x1b\[\d+m", "", painted) == "".join(text for text, _ in pieces)
    assert found == owners


# ---- the commands ----------------------------------------------------------------------------------------


def reply(kind: str) -> str:
    """What a server streams that was asked for both, with the report in a last chunk of its own."""
    chunks: list[dict[str, Any]] = []
    for text, trace in PIECES:
        choice: dict[str, Any] = {"text": text} if kind == "text" else {"delta": {"content": text}}
        choice["speculation"] = {"origins": trace.origins, "offsets": trace.offsets}
        chunks.append({"choices": [choice]})
    report = {"verifier": "strict", "lossy": False, "rounds": 4, "drafted": 16, "accepted": 7}
    chunks.append({"choices": [], "speculation": {**report, "histogram": [1, 0, 2, 1]}})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + DONE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, arguments: list[str], **environment: str) -> str:
    """What a command prints whose standard output is a terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        assert main(arguments) == 0
    return out.getvalue()


def test_chat_shows_drafts_in_colours(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.replies = [(200, reply("delta")), (200, reply("delta"))]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nmore\n"))
    seen = on_a_terminal(monkeypatch, ["chat", "--url", upstream.url, "--show-drafts"])
    assert seen.startswith(legend(True) + "\n")
    assert seen.count(f"Hello{GREEN}, {OFF}{YELLOW}w{OFF}{GREEN}örld{OFF}{CYAN}!{OFF}\n{DIM}[11 tokens: ") == 2
    bodies = [body for _, body, _ in upstream.asked]
    assert [body["speculation"] for body in bodies] == [{"report": True, "trace": True}] * 2
    assert bodies[1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello, wörld!"},
        {"role": "user", "content": "more"},
    ]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colours_gets_letters(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    upstream.replies = [(200, reply("text"))]
    seen = on_a_terminal(monkeypatch, ["complete", "x", "--url", upstream.url, "--show-drafts"], **environment)
    assert seen.split("\n") == [legend(False), "Hello, wörld!", "p    ddcddddb", *SUMMARY, ""]


def test_a_pipe_gets_letters_and_who_does_not_ask_gets_text(
    upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.replies = [(200, reply("text")), (200, reply("text"))]
    assert main(["complete", "x", "--url", upstream.url, "--show-drafts"]) == 0
    assert "\x1b" not in (marked := capsys.readouterr().out) and "p    ddcddddb\n" in marked
    assert main(["complete", "x", "--url", upstream.url]) == 0
    assert capsys.readouterr().out == "Hello, wörld!\n"
    assert "speculation" not in upstream.asked[1][1]
