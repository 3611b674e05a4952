"""The parts of the report that are programs of their own: each is run as a command, and its JSON and table are kept.

A program that is not there, fails or takes too long is told in the record, and the others go on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks.peers.install import say
from benchmarks.performance_contenders import FORMATS
from benchmarks.performance_record import Json
from benchmarks.report import ROOT

Finish = Callable[[Json], None]


@dataclass(frozen=True, slots=True)
class Program:
    """`name` in the record. `arguments` come after `python -m`; {json} and {images} are filled in.

    `seconds` is the longest that it may take. `quick` are arguments of a quick run.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    quick: tuple[str, ...] = ()
    resumes: bool = False  # it goes on with the JSON of an earlier run


_PLAIN = ("--config", "configs/ar.yaml")
_OURS = ("-m", "server", "serve", "--config", "configs/demo.yaml", "--set", "models.0.quant=int8", "--port", "{port}")


def _step(quant: str) -> Program:
    cases = ("--batch", "1,8,32", "--query", "1,8", "--kv", "200", "--prefill", "512", "--seconds", "1.5")
    arguments = ("benchmarks.step", *_PLAIN, "--set", f"models.0.quant={quant}", *cases, "--output", "{json}")
    return Program(f"step-{quant}", arguments, 240, ("--quick",))


def _limits(quant: str) -> Program:
    arguments = ("benchmarks.performance_limits", *_PLAIN, "--set", f"models.0.quant={quant}", "--json", "{json}")
    return Program(f"limits-{quant}", arguments, 180, ("--seconds", "0.2"))


_PEAKS = Program("peaks", ("benchmarks.performance_peaks", "--json", "{json}"), 60)
_START = ("--runs", "3", "--tokens", "32")
_HOST = ("--pipeline", "autoregressive", "dflash", "--batch", "1", "32", "256")
_FRONT = ("--streams", "1", "32", "128", "--variants", "chat", "completions")
_GROWTH = ("benchmarks.growth", "--engine", "demo", "--quant", "int8")

PROGRAMS: dict[str, tuple[Program, ...]] = {
    "steps": (_PEAKS, *(make(quant) for quant in FORMATS for make in (_limits, _step))),
    "quality": (Program("quality", ("benchmarks.quality", "--json", "{json}"), 900, ("--quick",), resumes=True),),
    "host": (
        Program("startup", ("benchmarks.startup", *_START, "--json", "{json}", "--", sys.executable, *_OURS), 240),
        Program("host", ("benchmarks.host", *_HOST, "--output", "{json}"), 240, ("--runs", "1")),
    ),
    "front": (
        Program("front", ("benchmarks.front", *_FRONT, "--json", "{json}"), 240, ("--seconds", "1")),
        Program(
            "overhead",
            ("benchmarks.overhead", "--config", "configs/ar.yaml", "--rounds", "2", "--json", "{json}"),
            240,
            ("--tokens", "16"),
        ),
    ),
    "growth": (Program("growth", (*_GROWTH, "--json", "{json}", "--picture", "{images}/performance_growth.png"), 600),),
}


@dataclass
class Runs:
    """What the programs of one part have given so far: their JSON and what they printed, by name."""

    json: dict[str, object] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def found(self) -> Json:
        return {
            "json": self.json,
            "printed": self.printed,
            "commands": self.commands,
            "seconds": self.seconds,
            "failed": self.failed,
        }


def run(programs: Sequence[Program], images: Path, quick: bool, earlier: Runs, save: Callable[[Runs], None]) -> Runs:
    """One after the other; what an earlier run had of a program stays until it has run anew."""
    runs = earlier
    for program in programs:
        began = time.monotonic()
        say(f"{program.name}: {shown(program, quick)}")
        with tempfile.TemporaryDirectory(prefix="slipstream-performance-") as folder:
            file = Path(folder) / "found.json"
            if program.resumes and program.name in runs.json:
                file.write_bytes(msgspec.json.encode(runs.json[program.name]))
            runs.failed.pop(program.name, None)
            try:
                printed = _call(program, file, images, quick)
                runs.json[program.name] = msgspec.json.decode(_anonymous(file.read_text(encoding="utf-8")))
                runs.printed[program.name] = printed
                runs.commands[program.name] = shown(program, quick)
                runs.seconds[program.name] = time.monotonic() - began
            except (OSError, RuntimeError) as error:
                runs.failed[program.name] = str(error)
                say(f"{program.name} failed: {error}")
        save(runs)
    return runs


def _call(program: Program, file: Path, images: Path, quick: bool) -> str:
    """What it printed. Raises RuntimeError with the end of what it said."""
    command = [sys.executable, "-m", *_filled(program, quick, str(file), str(images))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, said = process.communicate(timeout=program.seconds)
    except BaseException as error:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"it took longer than {program.seconds} s") from None
        raise
    if process.returncode:
        raise RuntimeError(_last_line(said) or f"it ended with {process.returncode}")
    return _anonymous(printed.strip())


def _anonymous(text: str) -> str:
    """Without where Python and this checkout lie on this machine."""
    return text.replace(sys.executable, "python").replace(f"{ROOT}/", "")


def shown(program: Program, quick: bool) -> str:
    """The command as a user would type it."""
    parts = _filled(program, quick, f"{program.name}.json", "docs/images")
    return " ".join(("python -m", *("python" if part == sys.executable else part for part in parts)))


def _filled(program: Program, quick: bool, file: str, images: str) -> list[str]:
    arguments = list(program.arguments)
    border = arguments.index("--") if "--" in arguments else len(arguments)
    if quick:
        arguments[border:border] = program.quick
    return [part.replace("{json}", file).replace("{images}", images) for part in arguments]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
