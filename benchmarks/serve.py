"""`slipstream bench serve`: load on any OpenAI-compatible server, and what its users would see of it.

The client shares the machine with a local server, so it does little: one connection per request in flight, bytes
stamped as they come, requests made before the clock starts. What it costs is measured and printed with the rest.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import msgspec
import uvloop

from benchmarks import serve_record
from benchmarks.client import Server, find_counter
from benchmarks.processes import OtherLoad, listeners
from benchmarks.serve_acceptance import Counters, acceptance, read_counters
from benchmarks.serve_arrivals import timetable
from benchmarks.serve_load import OK, Sender, closed_loop, open_loop, until_stopped
from benchmarks.serve_measures import summarize
from benchmarks.serve_options import ENDPOINTS, Load, Options, parse, redacted
from benchmarks.serve_progress import progress
from benchmarks.serve_prompts import Job, JobMaker
from benchmarks.serve_record import OtherCores, Point
from benchmarks.stream import BenchmarkError
from server.settings import load_settings

IDLE_SECONDS = 1.0  # how long the load of other processes is watched before and after a point
POOL = 256  # prompts of a point that only a duration ends


class Run:
    """One call of the command. `points` are those that ended, whole or not; `stop` ends it early."""

    def __init__(self, options: Options, server: Server) -> None:
        self.points: list[Point] = []
        self.notes: list[str] = []
        self.stop = asyncio.Event()
        self._options = options
        self._server = server

    async def measure(self) -> None:
        """Warm up, then every point. Raises BenchmarkError when the warm-up fails: nothing would come of the rest."""
        counter, counted_by = await find_counter([self._server])
        if not counted_by:
            self.notes.append("the server has no /tokenize: prompt lengths were estimated from their letters")
        maker = JobMaker(self._options, self._server.model, counter, self._server.max_model_len, self.notes)
        await until_stopped(self._warm_up(maker), self.stop)
        for load in self._options.loads:
            if not self.stop.is_set():
                await self._point(load, maker)

    async def _warm_up(self, maker: JobMaker) -> None:
        sender = self._sender()
        await closed_loop(sender, await maker.make(self._options.warm_up), self._options.warm_up, None)
        for outcome in sender.outcomes:
            if outcome.kind != OK:
                raise BenchmarkError(f"the warm-up failed ({outcome.kind}): {outcome.message}")

    async def _point(self, load: Load, maker: JobMaker) -> None:
        options, jobs, times = self._options, list[Job](), list[float]()
        if load.rate is not None:
            limits = (options.requests, options.seconds)
            times = timetable(load.rate, load.burstiness, options.seed, *limits)
        count = len(times) if load.rate is not None else options.requests or POOL

        async def make() -> None:
            jobs.extend(await maker.make(count))

        if await until_stopped(make(), self.stop) and jobs:
            self.points.append(await self._measured(load, jobs, times))

    async def _measured(self, load: Load, jobs: Sequence[Job], times: Sequence[float]) -> Point:
        """Send it all, with an eye on everything else that runs."""
        options, sender = self._options, self._sender()
        endless = load.rate is None and options.requests is None
        if load.rate is not None:
            work = open_loop(sender, jobs, times)
        else:
            work = closed_loop(sender, cycle(jobs) if endless else jobs, load.clients or 1, options.seconds)
        before, counters = await self._idle_load(), await self._counters()
        gc.freeze()  # the prompts need not be looked through while a stream runs
        began, cpu = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.process_time()
        with OtherLoad(listeners(self._server.url)) as during:
            async with progress(sender, load.title, None if endless else len(jobs), sys.stderr):
                await until_stopped(work, self.stop)
            cpu = time.process_time() - cpu
        found = acceptance(counters, await self._counters())
        others = OtherCores(before, during.cores, await self._idle_load())
        notes: tuple[str, ...] = ()
        if endless and len(sender.outcomes) > len(jobs):
            notes = (f"its {len(jobs)} prompts were sent again and again (prefix caches!)",)
        summary = summarize(sender.outcomes, options.goodput)
        return Point(load, began, tuple(sender.outcomes), summary, others, cpu, found, notes)

    def _sender(self) -> Sender:
        return Sender(self._server, ENDPOINTS[self._options.endpoint], self._options.timeout)

    async def _idle_load(self) -> float:
        with OtherLoad(listeners(self._server.url)) as load:
            await asyncio.sleep(IDLE_SECONDS)
        return load.cores

    async def _counters(self) -> Counters:
        return read_counters(await self._server.text_of("/metrics") or "")


async def run(options: Options, about: serve_record.Record) -> int:
    """Measure, print, write. 0: fine, 1: nothing was answered, 130: interrupted (what was had is still printed)."""
    key = options.api_key or next(iter(load_settings().keys), "")
    async with Server("server", options.url, model=options.model, api_key=key) as server:
        current = Run(options, server)
        with interrupts(current.stop):
            await current.measure()
    points = [point for point in current.points if point.outcomes]
    if not points:
        if current.stop.is_set():
            return 130
        raise BenchmarkError("--duration: it was over before the first request was due")
    print(serve_record.table(points))
    print(f"\n{server.model} at {server.url}, {options.prompts} prompts, seed {options.seed}")
    for note in serve_record.notes(points, current.notes):
        print(f"note: {note}")
    about = {**about, "url": server.url, "model": server.model, "seed": options.seed}
    if options.output is not None:
        found = serve_record.record(about, points, current.notes, details=options.details)
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    if options.plot is not None:
        from benchmarks.plots import draw

        alone = f", {points[0].load.title}" if len(points) == 1 else ""
        draw(points, f"{server.model}, {options.prompts} prompts{alone}", options.plot)
    if current.stop.is_set():
        return 130
    return 0 if any(point.summary.succeeded for point in points) else 1


@contextmanager
def interrupts(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C ends the run and keeps its results; a second one ends everything."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def check_plot(path: Path | None) -> None:
    """Raises BenchmarkError before a long run, and not after it."""
    if path is not None:
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise BenchmarkError("--plot needs matplotlib; get it with: pip install 'slipstream[bench]'")


def main(arguments: Sequence[str]) -> int:
    """The command. Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted."""
    options = parse(arguments)
    command = ["slipstream", "bench", "serve", *redacted(arguments)]
    try:
        check_plot(options.plot)
        return uvloop.run(run(options, {"command": command, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))
    except BenchmarkError as error:
        print(f"slipstream bench serve: {error}", file=sys.stderr)
        return 1
