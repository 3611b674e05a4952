"""What `--show-drafts` shows: each token marked by where it came from, in colours or by letters under the text."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter

import msgspec

# Origin -> (name, what the legend says more, ANSI colour).
ORIGINS = {
    "d": ("drafted", "and accepted", "32"),
    "c": ("corrected", "by the target", "33"),
    "b": ("bonus", "behind a whole draft", "36"),
    "p": ("plain", "where nothing was drafted", ""),
}
# What an answer says that may not be the model's own, by its decoder.
_LOSSY = {
    "relaxed": "lossy: under {} the law of a token was {:.2%} away from the model's own, on average",
    "relaxed_greedy": "lossy: under {}, {:.2%} of the tokens are not the model's first choice",
}
WIDTH, TAB = 80, 8  # columns of a line that has letters under it, and between the stops of tabs


class Trace(msgspec.Struct):
    """A choice's `speculation`: a letter for each token, and where its text starts in the whole answer."""

    origins: str = ""
    offsets: list[int] = msgspec.field(default_factory=list)


class Report(msgspec.Struct):
    """An answer's `speculation`."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    histogram: list[int] = msgspec.field(default_factory=list)
    verifier: str | None = None
    lossy: bool = False
    decoder: str = "target"
    bias: float = 0.0


def legend(colours: bool) -> str:
    """One line that explains the marks."""
    if colours:
        return ", ".join(_paint(f"{name} {more}", letter) for letter, (name, more, _) in ORIGINS.items())
    return ", ".join(f"{letter}: {name} {more}" for letter, (name, more, _) in ORIGINS.items())


class DraftView:
    """One answer as it comes: `show` gives what to print for a piece of it, `close` the rest."""

    def __init__(self, colours: bool) -> None:
        self._colours = colours
        self._length = 0  # characters shown or held
        self._tokens: list[tuple[int, str]] = []  # (offset, origin), from the one that the next character belongs to
        self._begun = -1  # offset of the last token whose mark is set
        self._counts: Counter[str] = Counter()
        self._column = 0
        self._line: list[tuple[str, str]] = []  # characters without their line's end yet, and the marks under them

    def show(self, text: str, trace: Trace | None) -> str:
        """The next piece, ready to print; `trace` is of the tokens that came with it, whose text may lag behind."""
        if trace is not None:
            self._counts.update(trace.origins)
            self._tokens += zip(trace.offsets, trace.origins, strict=False)
        marked = [(char, *self._origin()) for char in text]
        if self._colours:
            runs = itertools.groupby(marked, key=lambda item: item[1])
            return "".join(_paint("".join(char for char, *_ in run), origin) for origin, run in runs)
        return "".join(self._put(char, origin if first else "") for char, origin, first in marked)

    def close(self, report: Report | None) -> str:
        """What is left to print, and in the last lines what drafting did."""
        rest = self._flush() if self._line else "\n" if self._colours else ""
        return rest + "\n".join(_paint(line, "dim") if self._colours else line for line in self._summary(report))

    def _origin(self) -> tuple[str, bool]:
        """The next character's origin, and whether it is the first one of its token."""
        while len(self._tokens) > 1 and self._tokens[1][0] <= self._length:
            self._tokens.pop(0)
        known = bool(self._tokens) and self._tokens[0][0] <= self._length
        offset, origin = self._tokens[0] if known else (self._begun, "p")
        first, self._begun = offset != self._begun, offset
        self._length += 1
        return origin, first

    def _put(self, char: str, mark: str) -> str:
        """Add a character to the line; the line, where it is full or at its end."""
        if char == "\n":
            return self._flush()
        char = " " * (TAB - self._column % TAB) if char == "\t" else char
        done = self._flush() if self._column + _columns(char) > WIDTH else ""
        self._column += _columns(char)
        self._line.append((char, mark))
        return done

    def _flush(self) -> str:
        line, self._line, self._column = self._line, [], 0
        under = "".join((mark or " ").ljust(_columns(char))[: _columns(char)] for char, mark in line)
        return "".join(char for char, _ in line) + "\n" + (under.rstrip() + "\n" if under.strip() else "")

    def _summary(self, report: Report | None) -> list[str]:
        if not self._counts:
            return ["[this server does not tell where its tokens come from]"]
        shares = ", ".join(f"{self._counts[origin]} {name}" for origin, (name, _, _) in ORIGINS.items())
        lines = [f"[{self._counts.total()} tokens: {shares}]"]
        if report is not None and report.rounds:
            each, share = 1 + report.accepted / report.rounds, report.accepted / max(1, report.drafted)
            counts = "  ".join(f"{stood}: {rounds}" for stood, rounds in enumerate(report.histogram))
            lines.append(
                f"[{report.rounds} rounds of {each:.2f} tokens; {report.accepted} of {report.drafted} drafted tokens "
                f"accepted, {share:.0%}; rounds by tokens accepted: {counts}]"
            )
        if report is not None and report.lossy:
            lines.append(f"[{_LOSSY.get(report.decoder, _LOSSY['relaxed']).format(report.verifier, report.bias)}]")
        return lines


def _paint(text: str, origin: str) -> str:
    code = "2" if origin == "dim" else ORIGINS.get(origin, ("",))[-1]
    return f"\x1b[{code}m{text}\x1b[0m" if code and text else text


def _columns(char: str) -> int:
    """How wide a terminal draws a character, or a tab's spaces."""
    if len(char) > 1:
        return len(char)
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
