"""What the user sees between the command and a ready server: a table of phases, and a `curl` line to paste."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from engine.types import Phase
from server.connect import UNIX


class StartupTable:
    """Prints each phase as it ends. Rows may come from any thread."""

    def __init__(self, url: str, models: Sequence[str], *, needs_key: bool, out: TextIO | None = None) -> None:
        self._url = url
        self._models = models
        self._needs_key = needs_key
        self._out = out or sys.stdout
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._rows = 0
        several = max(map(len, models)) + 2 if len(models) > 1 else 0  # the rows of each then begin with its name
        self._width = 28 + several

    def add(self, phase: Phase) -> None:
        """One phase is over."""
        memory = f"{phase.memory / 2**20:,.0f} MB" if phase.memory else "-"
        with self._lock:
            if not self._rows:
                self._print(f"{'phase':<{self._width}} {'seconds':>8} {'memory':>10}")
            self._rows += 1
            self._print(f"{phase.name:<{self._width}} {phase.seconds:>8.1f} {memory:>10}  {phase.detail}".rstrip())

    def finish(self) -> None:
        """Every model answers: the last row, and how to ask."""
        with self._lock:
            self._print(f"{'ready':<{self._width}} {time.monotonic() - self._began:>8.1f}\n")
            where = self._url if self._url.startswith(UNIX) else f"{self._url}/v1"
            self._print(f"{', '.join(self._models)} at {where} (Ctrl-C stops the server). Try:\n")
            self._print(curl(self._url, self._models[0], needs_key=self._needs_key))

    def _print(self, line: str) -> None:
        try:
            print(line, file=self._out, flush=True)
        except BrokenPipeError:  # who read it has gone, as in `slipstream serve | head`; the server goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


def base_url(host: str, port: int, secure: bool = False) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", ""):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def curl(url: str, model: str, *, needs_key: bool) -> str:
    """A command line that asks `model` a question, ready for a POSIX shell."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": model, "messages": question, "max_tokens": 64, "temperature": 0}, ensure_ascii=False)
    key = ' -H "Authorization: Bearer YOUR_API_KEY"' if needs_key else ""
    where = shlex.quote(f"{url}/v1/chat/completions")
    if url.startswith(UNIX):
        where = f"--unix-socket {shlex.quote(url.removeprefix(UNIX))} http://localhost/v1/chat/completions"
    return f'curl {where} -H "Content-Type: application/json"{key} -d {shlex.quote(body)}'
