"""`slipstream top`: what a running server is doing, in a terminal; looks again every second."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import httpx
import msgspec

from server.connect import open_client
from server.settings import load_settings, wants_colours
from server.top import terminal
from server.top.frame import Screen, frame
from server.top.samples import Look, read_metrics
from server.top.view import restarted, views

WINDOW = 5  # looks that rates are taken over


class Unreachable(Exception):
    """No answer, or none of such a server; the message is for the user."""


class _Health(msgspec.Struct):
    status: str
    reason: str = ""


class _Load(msgspec.Struct):
    server_load: int = 0
    draining: bool = False


class Watch:
    """The last looks at one server."""

    def __init__(self, client: httpx.Client, model: str | None) -> None:
        self._client = client
        self._model = model
        self._looks: deque[Look] = deque(maxlen=WINDOW + 1)

    def look(self) -> None:
        """Raises Unreachable; what was seen before is forgotten then."""
        try:
            look = self._look()
        except (httpx.HTTPError, msgspec.MsgspecError, ValueError) as error:
            self._looks.clear()
            raise Unreachable(_reason(error)) from error
        if self._looks and restarted(self._looks[-1], look):
            self._looks.clear()
        self._looks.append(look)

    def draw(self, url: str, screen: Screen, notice: str = "") -> str:
        clock = time.strftime("%H:%M:%S")
        if not self._looks:
            return frame(url, None, [], notice or "looking for it", clock, screen)
        now = self._looks[-1]
        models = [view for view in views(self._looks[0], now) if self._model in (None, view.name)]
        if self._model is not None and not models:
            notice = notice or f"serves no model {self._model}; it has: {', '.join(now.models) or 'none yet'}"
        return frame(url, now, models, notice, clock, screen)

    def _look(self) -> Look:
        health = msgspec.json.decode(self._client.get("health").content, type=_Health)
        ready = self._client.get("ready").status_code == 200
        load = self._get("load")
        models, limited = read_metrics(self._get("metrics").text)
        levels = msgspec.json.decode(load.content, type=_Load)
        return Look(
            at=time.monotonic(),
            status=health.status,
            reason=health.reason,
            ready=ready,
            server_load=levels.server_load,
            draining=levels.draining,
            limited=limited,
            models=models,
        )

    def _get(self, path: str) -> httpx.Response:
        response = self._client.get(path)
        response.raise_for_status()
        return response


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code} from {error.request.url.path}"
    if isinstance(error, httpx.HTTPError):
        return str(error) or type(error).__name__
    return "something answers, but no such server"


def main(arguments: Sequence[str]) -> int:
    """Show frames until the user leaves; with --once, or without a terminal, a single one."""
    parser = argparse.ArgumentParser(prog="slipstream top", description="Watch a running server in the terminal.")
    where = "where the server is; unix:PATH is a socket (default: %(default)s)"
    parser.add_argument("--url", default="http://127.0.0.1:8000", help=where)
    parser.add_argument("--model", metavar="ID", help="show this model alone")
    parser.add_argument(
        "--interval", metavar="S", type=_seconds, default=1.0, help="seconds between looks (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame, over one interval, and leave")
    parsed = parser.parse_args(arguments)
    key = next(iter(load_settings().keys), None)
    try:
        with open_client(parsed.url, key, timeout=3.0) as client:
            watch = Watch(client, parsed.model)
            if parsed.once or not sys.stdout.isatty():
                return _once(watch, parsed.url, parsed.interval)
            with terminal.taken():
                signal.signal(signal.SIGTERM, _end)  # so that the terminal is given back
                _follow(watch, parsed.url, parsed.interval)
    except httpx.InvalidURL as error:
        sys.stderr.write(f"slipstream: {parsed.url}: {error}\n")
        return 1
    return 0


def _once(watch: Watch, url: str, interval: float) -> int:
    try:
        watch.look()
        time.sleep(interval)
        watch.look()
    except Unreachable as error:
        sys.stderr.write(f"slipstream: no server answers at {url}: {error}\n")
        return 1
    sys.stdout.write(watch.draw(url, _screen(tall=True)) + "\n")
    return 0


def _follow(watch: Watch, url: str, interval: float) -> None:
    notice = ""

    def redraw() -> None:
        terminal.draw(watch.draw(url, _screen(), notice))

    redraw()
    try:
        while True:
            try:
                watch.look()
                notice = ""
            except Unreachable as error:
                notice = f"no answer, trying again ({error})"
            redraw()
            if terminal.wait(interval, redraw) in ("q", "Q"):
                return
    except KeyboardInterrupt:
        return


def _screen(tall: bool = False) -> Screen:
    """What standard output can show; `tall`: any number of lines."""
    columns, lines = terminal.size()
    blocks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return Screen(columns, 10_000 if tall else lines, wants_colours(sys.stdout), blocks)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("from 0.1 to 3600 seconds")
    return value


def _end(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(143)
