"""A terminal as a place for frames: another screen meanwhile, keys without Enter, and all of it back at the end."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
GLANCE_SECONDS = 0.25  # between two looks at the size of the terminal


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """The terminal is ours: standard output for frames, standard input for keys if it is one."""
    keys = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keys) if keys is not None else None
    try:
        if keys is not None:
            tty.setcbreak(keys)
        _write(ENTER)
        yield
    finally:
        _write(LEAVE)
        if keys is not None and before is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)


def draw(frame: str) -> None:
    lines = f"{CLEAR_LINE}\r\n".join(frame.split("\n"))
    _write(f"{HOME}{lines}{CLEAR_LINE}{CLEAR_REST}")


def size() -> tuple[int, int]:
    """Columns and lines."""
    columns, lines = shutil.get_terminal_size((80, 24))
    return max(columns, 20), max(lines, 4)


def wait(seconds: float, redraw: Callable[[], None]) -> str:
    """Wait for a key, `seconds` at most; empty without one. Calls `redraw` when the terminal has another size."""
    keys = [sys.stdin] if sys.stdin.isatty() else []
    until, before = time.monotonic() + seconds, size()
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select(keys, [], [], min(left, GLANCE_SECONDS))
        if ready:
            return os.read(sys.stdin.fileno(), 64).decode(errors="replace")[:1]
        if size() != before:
            before = size()
            redraw()
    return ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
