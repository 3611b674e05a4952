"""Microseconds of server CPU per streamed chunk, with an engine that computes nothing: `python -m benchmarks.front`.

The server is the real one (`front_server.py`): HTTP, validation, tokenizer, detokenizer, JSON, event streams, messages
between the processes. Only the worker in its engine process is none: its steps end at whole multiples of a period, so
that each chunk's way can be timed in the client too:

- cpu: processor time of the front process, all its threads, over the chunks that left it in the same seconds;
- delivery: from the end of the step that made the token to the moment the client has read its chunk (this client's own
  reading is inside);
- between steps: what the engine process does from the end of one step to the start of the next: update, the message
  to the front, new requests, the next plan.

`--busy-threads 2` has the steps compute on that many threads, as a model would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import msgspec
import yaml

from benchmarks import report
from benchmarks.front_client import Ask, Crowd
from benchmarks.front_server import MARK
from benchmarks.launch import Launched, free_port, running
from benchmarks.null_worker import GAPS, SCRIPT, Script
from benchmarks.processes import OtherLoad
from benchmarks.stream import BenchmarkError, Piece
from engine.hub.resolve import resolve
from engine.types import DecodeTraits

DRAFTED = 4  # tokens of a round, half of which stand: three tokens in a chunk
LOGPROBS = 5
VARIANTS = ("chat", "completions", "chat+logprobs", "completions+logprobs", "chat+trace", "completions+trace")
READY_SECONDS = 60.0
Cpu = tuple[float, float]  # seconds, and how many of them in the system
NEVER = 4000  # tokens: nobody's answer ends while the watch runs


@dataclass(frozen=True, slots=True)
class Case:
    """What was seen of one case between two times: seconds of the server, bytes of all clients."""

    variant: str
    streams: int
    began: float
    ended: float
    cpu: Cpu
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Figure:
    """One case. `chunks` in a second of all streams, `core`: the share of a core they took. Times in microseconds."""

    variant: str
    streams: int
    chunks: float
    cpu: float
    system: float
    core: float
    delivery_mean: float
    delivery_p99: float
    between_steps: float


def ask_of(variant: str) -> Ask:
    """The request of a variant's clients."""
    endpoint, _, extra = variant.partition("+")
    body: dict[str, object] = {"max_tokens": NEVER, "ignore_eos": True, "temperature": 0, "stream": True}
    if endpoint == "chat":
        body |= {"messages": [{"role": "user", "content": "Tell me everything about slipstreams."}]}
        body |= {"logprobs": True, "top_logprobs": LOGPROBS} if extra == "logprobs" else {}
    else:
        body |= {"prompt": "A slipstream is"} | ({"logprobs": LOGPROBS} if extra == "logprobs" else {})
    if extra == "trace":
        body["speculation"] = {"trace": True}
    return Ask("/v1/chat/completions" if endpoint == "chat" else "/v1/completions", body)


def write_checkpoint(folder: Path, tokenizer: Path, script: Script) -> None:
    """A folder with a real tokenizer and no model, whose worker speaks words of that tokenizer."""
    for file in (*tokenizer.glob("*.json"), *tokenizer.glob("*.jinja")):
        (folder / file.name).write_bytes(file.read_bytes())
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    words = sorted(number for piece, number in vocabulary.items() if piece[:1] == "\u0120" and piece[1:].isascii())
    script = msgspec.structs.replace(script, tokens=tuple(words[1000:2024:4]), vocab_size=max(vocabulary.values()) + 1)
    (folder / SCRIPT).write_bytes(msgspec.json.encode(script))


def _config(folder: Path, streams: int, drafts: bool) -> dict[str, object]:
    model: dict[str, object] = {"id": "null", "path": str(folder), "max_model_len": 8192}
    if drafts:
        model |= {"pipeline": "speculative", "draft": {"drafter": "ngram", "max_draft": DRAFTED}}
    return {"models": [model], "scheduler": {"max_num_seqs": streams, "max_batched_tokens": 16 * streams + 512}}


@contextmanager
def served(arguments: argparse.Namespace, folder: Path, traits: DecodeTraits) -> Iterator[Launched]:
    """The server over a worker with these traits, for as long as the block lasts."""
    most = max(arguments.streams)
    script = Script(
        traits,
        num_blocks=most * 520,
        step_seconds=arguments.step_ms / 1000,
        busy_threads=arguments.busy_threads,
    )
    write_checkpoint(folder, resolve("demo", arguments.cache_dir.expanduser()), script)
    config, port = folder / "null.yaml", free_port()
    config.write_text(yaml.safe_dump(_config(folder, most, traits.drafts)))
    command = [sys.executable, "-m", "benchmarks.front_server", str(arguments.profile or "")]
    command += ["serve", "--config", str(config), "--port", str(port)]
    with running(command, port, folder / "server.log", "/ready", READY_SECONDS) as launched:
        yield launched


async def measure(launched: Launched, variant: str, streams: int, arguments: argparse.Namespace) -> Case:
    """One case: all streams flowing for `--seconds`."""
    async with Crowd(launched.url, ask_of(variant), streams) as crowd:
        await crowd.flowing(READY_SECONDS)
        if arguments.profile:
            os.kill(launched.pid, signal.SIGUSR2)
        before, began = await cpu_seconds(launched), time.monotonic()
        await asyncio.sleep(arguments.seconds)
        after, ended = await cpu_seconds(launched), time.monotonic()
        if arguments.profile:
            os.kill(launched.pid, signal.SIGUSR2)
            await asyncio.sleep(0.5)
        cpu = after[0] - before[0], after[1] - before[1]
        return Case(variant, streams, began, ended, cpu, crowd.pieces(began, ended))


def figure_of(case: Case, gaps: list[tuple[float, float]], period: float) -> Figure:
    """`gaps`: what the worker left behind, see PacedWorker."""
    chunks = sum(data.count(b"data: ") for _, data in case.pieces)
    if not chunks:
        raise BenchmarkError(f"{case.variant}: no chunk came in {case.ended - case.began:.1f} s")
    delivery = [1e6 * (at % period) for at, _ in case.pieces]
    between = [1e6 * seconds for at, seconds in gaps if case.began <= at < case.ended]
    return Figure(
        case.variant,
        case.streams,
        chunks=chunks / (case.ended - case.began),
        cpu=1e6 * case.cpu[0] / chunks,
        system=1e6 * case.cpu[1] / chunks,
        core=case.cpu[0] / (case.ended - case.began),
        delivery_mean=mean(delivery),
        delivery_p99=report.percentile(delivery, 99),
        between_steps=median(between),
    )


async def cpu_seconds(launched: Launched) -> Cpu:
    """Processor time of the server so far, in its own words, and the system's part of it. Raises BenchmarkError."""
    size = launched.log.stat().st_size
    os.kill(launched.pid, signal.SIGUSR1)
    for _ in range(200):
        await asyncio.sleep(0.005)
        with launched.log.open("rb") as log:
            log.seek(size)
            _, mark, rest = log.read().decode(errors="replace").partition(MARK)
        if mark and "\n" in rest:
            total, system = rest.partition("\n")[0].split()
            return float(total), float(system)
    raise BenchmarkError("the server does not say how much processor time it took")


def run(arguments: argparse.Namespace) -> list[Figure]:
    """All cases; drafting ones have a server of their own."""
    figures = []
    for drafts in (False, True):
        variants = [name for name in arguments.variants if name.endswith("+trace") is drafts]
        if not variants:
            continue
        traits = DecodeTraits(lookahead=DRAFTED, drafts=True) if drafts else DecodeTraits()
        with tempfile.TemporaryDirectory(prefix="slipstream-front-") as place:
            folder = Path(place)
            with served(arguments, folder, traits) as launched:
                cases = asyncio.run(_cases(launched, variants, arguments))
            gaps = msgspec.json.decode((folder / GAPS).read_bytes(), type=list[tuple[float, float]])
        figures += [figure_of(case, gaps, arguments.step_ms / 1000) for case in cases]
    return figures


async def _cases(launched: Launched, variants: list[str], arguments: argparse.Namespace) -> list[Case]:
    return [
        await measure(launched, variant, streams, arguments) for variant in variants for streams in arguments.streams
    ]


def front_table(figures: list[Figure]) -> str:
    head = ["", "streams", "chunks/s", "CPU us/chunk", "system", "core", "delivery us", "p99", "between steps us"]
    rows = [
        [
            f.variant,
            str(f.streams),
            *(report.show(value) for value in (f.chunks, f.cpu, f.system, f.core)),
            *(report.show(value) for value in (f.delivery_mean, f.delivery_p99, f.between_steps)),
        ]
        for f in figures
    ]
    return report.table([head, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front", description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--step-ms", type=float, default=66.7, help="15 steps a second is a busy model's pace")
    parser.add_argument("--seconds", type=float, default=4.0, help="for which each case is watched")
    parser.add_argument("--busy-threads", type=int, default=0, help="that compute while a step lasts")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="cProfile of the server's event loop, last case")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    try:
        with OtherLoad({os.getpid()}) as load:
            figures = run(arguments)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        command = f"python -m benchmarks.front {shlex.join(sys.argv[1:])}".strip()
        report.write_record(arguments.json, command, load.cores, {"figures": [asdict(figure) for figure in figures]})
    print(front_table(figures))
    print(f"\n{report.machine()}; {load.cores:.2f} cores busy beside; {report.git_commit()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
