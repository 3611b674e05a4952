"""How long a server takes from its start to readiness, and how much memory all its processes need together.

    python -m benchmarks.startup --runs 5 -- slipstream serve --config configs/demo.yaml --port {port}

The command is started anew for every run, with {port} filled in. Seconds count from the start of the process to the
first 200 of the readiness path, asked every 20 ms. Memory is sampled over the whole process tree every 50 ms, to the
end of a load of streamed requests: a server that has only started has not touched its KV pool yet. The start from a
warm cache is what is measured; run it once before if the cache is cold. Any server will do: see --ready-path.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.client import Server
from benchmarks.launch import ServerProcess, fill_in_port, free_port
from benchmarks.processes import MemorySampler, OtherLoad
from benchmarks.prompts import Prompts, estimate_tokens, licence_text
from benchmarks.scenarios import crowd
from benchmarks.stream import BenchmarkError


@dataclass(frozen=True, slots=True)
class Start:
    """One run. Memory in bytes, see `MemorySampler`; `other_load` in busy cores until readiness."""

    ready_seconds: float
    peak_at_ready: int
    peak: int
    upper_bound: int
    stop_seconds: float
    other_load: float


async def put_load(url: str, requests: int, new_tokens: int, seed: int) -> None:
    """`requests` streamed completions at once."""
    async with Server("server", url) as server:
        prompts = await Prompts(licence_text(), estimate_tokens, seed).mixed(requests)
        await crowd(server, prompts, new_tokens, requests)


def start_once(arguments: argparse.Namespace, number: int, log: Path) -> Start:
    """Start, load, stop. Raises BenchmarkError with the end of the server's log when it does not come up."""
    port = free_port()
    command = fill_in_port(arguments.command, port)
    server = ServerProcess(command, port, log)
    try:
        memory = MemorySampler(server.pid)
        try:
            with OtherLoad({server.pid}) as load:
                seconds = server.wait_ready(arguments.ready_path, arguments.timeout)
            peak_at_ready = memory.peak
            if arguments.requests:
                asyncio.run(put_load(server.url, arguments.requests, arguments.tokens, number))
        finally:
            memory.stop()
    finally:
        stop_seconds = server.stop()
    return Start(seconds, peak_at_ready, memory.peak, memory.upper_bound, stop_seconds, load.cores)


def startup_table(starts: Sequence[Start]) -> str:
    """One row per figure: its median and range over the runs. MB are 10^6 bytes."""
    figures = {
        "start to ready, s": [start.ready_seconds for start in starts],
        "peak memory until ready, MB": [start.peak_at_ready / 1e6 for start in starts],
        "peak memory under load, MB": [start.peak / 1e6 for start in starts],
        "  upper bound (sum of VmHWM), MB": [start.upper_bound / 1e6 for start in starts],
        "told to stop to gone, s": [start.stop_seconds for start in starts],
        "beside the start, cores": [start.other_load for start in starts],
    }
    return report.figure_table("", figures)


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the command after the first `--`."""
    if "--" not in arguments:
        return list(arguments), []
    border = list(arguments).index("--")
    return list(arguments[:border]), list(arguments[border + 1 :])


def main() -> int:
    own, command = split_command(sys.argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        usage="%(prog)s [options] -- COMMAND ... {port}",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ready-path", default="/ready", help="other servers: /health (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to become ready")
    parser.add_argument("--requests", type=int, default=32, help="of the load at the end of a run; 0 for none")
    parser.add_argument("--tokens", type=int, default=128, help="of each of those")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(own)
    if not command:
        parser.error("no server command after --")
    arguments.command = command
    starts = []
    try:
        with tempfile.TemporaryDirectory(prefix="slipstream-startup-") as folder:
            for number in range(arguments.runs):
                starts.append(start_once(arguments, number, Path(folder) / f"{number}.log"))
                print(f"run {number + 1}: ready after {starts[-1].ready_seconds:.2f} s", file=sys.stderr, flush=True)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        about = {"commit": report.git_commit(), "machine": report.machine(), "command": command}
        record = {**about, "runs": [asdict(start) for start in starts]}
        arguments.json.write_bytes(msgspec.json.encode(record) + b"\n")
    print(startup_table(starts))
    print(f"\n{len(starts)} runs of: {' '.join(command)}; {report.machine()}; commit {report.git_commit()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
