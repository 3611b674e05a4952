"""Grammar libraries in processes of their own: each job has a time limit, and may end its process."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0

Found = dict[str, object]


class Runner:
    """One library. Its process is started again after a job that ended it."""

    def __init__(self, library: str) -> None:
        self.library = library
        self._process: subprocess.Popen[str] | None = None

    def available(self) -> bool:
        try:
            self._running()
        except RuntimeError:
            return False
        return True

    def run(
        self, kind: str, text: str, *, steps: int, seed: int = 0, seconds: float, accept: Sequence[str] = ()
    ) -> Found:
        """What `grammar_child.answer` found; or {"ended": "timeout" or "crash"}. Always with the peak memory in MiB."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        before = self._memory()
        job = {"kind": kind, "text": text, "steps": steps, "seed": seed, "accept": list(accept)}
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = self._line(seconds)
        except BrokenPipeError:
            line = ""
        if line:
            found: Found = json.loads(line)
            return {**found, "mib": max(0.0, self._memory() - before)}
        failure = "timeout" if line is None else "crash"
        self.close()
        return {"failure": failure}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-m", "benchmarks.grammar_child", self.library]
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            if not self._line(START_SECONDS):
                self.close()
                raise RuntimeError(f"{self.library} does not start; is it installed?")
        return self._process

    def _line(self, seconds: float) -> str | None:
        """The next line; None if it does not come in time, empty if the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None

    def _memory(self) -> float:
        """Most memory that the process has had, in MiB."""
        assert self._process is not None
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return 0.0
        line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
        return int(line.split()[1]) / 1024

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def numbers(found: Mapping[str, object], key: str) -> list[float]:
    values = found.get(key)
    return [float(value) for value in values] if isinstance(values, list) else []
