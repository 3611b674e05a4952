"""What an operator may ask of an engine process, answered between two steps: forget the prefix cache, record steps."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Protocol, TextIO, cast

from engine.cluster.messages import ControlReply, ResetPrefixCache, StartProfile, StopProfile
from engine.core import EngineCore
from engine.registry import PROFILERS, resolve
from engine.types import EngineStats

logger = logging.getLogger(__name__)

STEPS_FILE, TRACE_FILE = "steps.jsonl", "trace.json"

ControlMessage = ResetPrefixCache | StartProfile | StopProfile


class Trace(Protocol):
    """What records the operations of steps, see `engine.registry.PROFILERS`."""

    def start(self) -> None: ...

    def stop(self, path: Path) -> None:
        """End it and write it; `path` does not exist yet."""
        ...


class Profile:
    """A recording under way: one line of JSON for each step, and a trace of its operations where torch runs."""

    def __init__(self, folder: Path, seconds: float, steps: int) -> None:
        """Makes the folder. Raises OSError if that can't be done, or it is there already."""
        folder.mkdir(mode=0o700, parents=True)
        self.steps = 0
        self._folder = folder
        self._most = steps
        self._lines: TextIO = (folder / STEPS_FILE).open("w", encoding="utf-8")
        self._trace: Trace | None = None
        if "torch" in sys.modules:  # else there are no operations to trace, and importing it would take seconds
            self._trace = cast("type[Trace]", resolve(PROFILERS, "torch", "profiler"))()
            self._trace.start()  # takes a second
        self._began = time.monotonic()
        self._deadline = self._began + seconds

    @property
    def over(self) -> bool:
        return self.steps >= self._most or time.monotonic() >= self._deadline

    def note(self, stats: EngineStats) -> None:
        line = {
            "at": round(time.monotonic() - self._began, 6),  # seconds since the start of the recording
            "step": stats.steps,
            "seconds": round(stats.step_seconds, 6),
            "tokens": stats.step_tokens,
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_blocks_used": stats.kv_blocks_used,
            "preemptions": stats.preemptions,
            "drafted": stats.spec_drafted,
            "accepted": stats.spec_accepted,
        }
        self._lines.write(json.dumps(line) + "\n")
        self.steps += 1

    def close(self) -> None:
        """Write what is left. Raises whatever stands in the way."""
        self._lines.close()
        if self._trace is not None:
            self._trace.stop(self._folder / TRACE_FILE)


class Controls:
    """One per engine process. What goes wrong is the answer: nothing that an operator asks ends the process."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._profile: Profile | None = None

    def answer(self, message: ControlMessage) -> ControlReply:
        try:
            match message:
                case ResetPrefixCache(token):
                    return ControlReply(token, self._core.reset_prefix_cache())
                case StartProfile(token, folder, seconds, steps):
                    if self._profile is not None:
                        return ControlReply(token, error="a recording is under way already")
                    self._profile = Profile(Path(folder), seconds, steps)
                    return ControlReply(token)
                case StopProfile(token):
                    if self._profile is None:
                        return ControlReply(token, error="no recording is under way")
                    return ControlReply(token, self._end())
        except Exception as error:  # a full disk, say
            logger.exception("what the operator asked for failed")
            return ControlReply(message.token, error=f"{type(error).__name__}: {error}")

    @property
    def recording(self) -> bool:
        return self._profile is not None

    def note(self, stats: EngineStats | None = None) -> None:
        """Call after each step, and now and then while nothing happens."""
        if self._profile is None:
            return
        try:
            if stats is not None:
                self._profile.note(stats)
            if self._profile.over:
                self._end()
        except Exception:
            logger.exception("the recording of steps ended early")
            self._profile = None

    def _end(self) -> int:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.close()
        return profile.steps
