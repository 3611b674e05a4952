"""What `bench serve` leaves behind: a table for people, a JSON record for machines."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

from benchmarks import report
from benchmarks.serve_acceptance import Acceptance
from benchmarks.serve_load import Outcome
from benchmarks.serve_measures import Spread, Summary
from benchmarks.serve_options import Load

QUIET = 0.1  # cores of other processes above which a figure should not be trusted
LATE = 10.0  # milliseconds behind the timetable that are told
PACKAGES = ("slipstream", "httpx", "httpcore", "h11", "uvloop")
LATENCIES = (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("E2E", "e2e"))
Record = dict[str, object]


@dataclass(frozen=True, slots=True)
class OtherCores:
    """Busy cores of all processes but the server (where it is local) and this client: before, during and after."""

    before: float
    during: float
    after: float


@dataclass(frozen=True, slots=True)
class Point:
    """One load and what came of it. `client_seconds` are the processor seconds that this client used itself."""

    load: Load
    began: str
    outcomes: tuple[Outcome, ...]
    summary: Summary
    other_cores: OtherCores
    client_seconds: float
    acceptance: Acceptance | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def client_microseconds(self) -> float:
        """What a chunk cost this client, of processor time."""
        return 1e6 * self.client_seconds / self.summary.chunks if self.summary.chunks else 0.0

    @property
    def client_cores(self) -> float:
        return self.client_seconds / self.summary.seconds if self.summary.seconds else 0.0


def table(points: Sequence[Point]) -> str:
    """A column for each point."""
    kinds = sorted({kind for point in points for kind in point.summary.failed})
    rows: list[tuple[str, Callable[[Point], str]]] = [
        ("requests answered", lambda p: str(p.summary.succeeded)),
        *((f"requests failed: {kind}", _failures(kind)) for kind in kinds),
        *([("requests interrupted", _interrupted)] if any(p.summary.interrupted for p in points) else []),
        ("seconds", lambda p: report.show(p.summary.seconds)),
        ("requests/s", lambda p: report.show(p.summary.request_rate)),
        *([("requests/s within the goodput limits", _goodput)] if points[0].summary.goodput is not None else []),
        ("output tokens/s", lambda p: report.show(p.summary.output_rate)),
        ("input + output tokens/s", lambda p: report.show(p.summary.total_rate)),
        ("most requests in flight", lambda p: str(p.summary.peak_in_flight)),
    ]
    for title, name in LATENCIES:
        rows += [(f"{title} {figure}, ms", _latency(name, figure)) for figure in ("mean", "p50", "p90", "p95", "p99")]
    if any(p.acceptance for p in points):
        rows.append(("tokens per draft round, with the bonus", lambda p: _accepted(p, "length")))
        rows.append(("share of drafted tokens accepted", lambda p: _accepted(p, "rate")))
    rows.append(("this client, microseconds per chunk", lambda p: report.show(p.client_microseconds)))
    rows.append(("this client, cores", lambda p: report.show(p.client_cores)))
    rows.append(("other processes, cores (before, during, after)", _others))
    return report.table([["", *(p.load.title for p in points)], *([name, *map(show, points)] for name, show in rows)])


def notes(points: Sequence[Point], more: Sequence[str]) -> list[str]:
    """What a reader of the figures should know."""
    found = list(more)
    for point in points:
        summary, title = point.summary, point.load.title
        if summary.without_usage:
            found.append(f"{title}: {summary.without_usage} answers told no usage: their tokens are counted as chunks")
        if summary.lateness is not None and summary.lateness.p99 > LATE:
            found.append(f"{title}: this client sent up to {summary.lateness.max:.0f} ms behind its timetable")
        if point.other_cores.during > QUIET:
            found.append(f"{title}: other processes kept {point.other_cores.during:.2f} cores busy; run it again alone")
        found.extend(f"{title}: {note}" for note in point.notes)
        messages = {o.kind: o.message for o in reversed(point.outcomes) if o.message}
        found.extend(f"{title}: {summary.failed[kind]} x {kind}: {text[:200]}" for kind, text in messages.items())
    return found


def record(about: Record, points: Sequence[Point], more: Sequence[str], *, details: bool) -> Record:
    """Everything, ready for JSON. Times of requests are seconds from the first one sent of their point."""
    return {
        **about,
        "machine": report.machine(),
        "commit": report.git_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "notes": notes(points, more),
        "points": [_point(point, details) for point in points],
    }


def _point(point: Point, details: bool) -> Record:
    zero = min((outcome.sent for outcome in point.outcomes), default=0.0)
    accepted = point.acceptance
    return {
        "title": point.load.title,
        "load": asdict(point.load),
        "began": point.began,
        "summary": asdict(point.summary),
        "client_cores": point.client_cores,
        "client_microseconds_per_chunk": point.client_microseconds,
        "other_cores": asdict(point.other_cores),
        "speculation": {**asdict(accepted), "rate": accepted.rate, "length": accepted.length} if accepted else None,
        "requests": [_request(outcome, zero, details) for outcome in point.outcomes],
    }


def _request(outcome: Outcome, zero: float, details: bool) -> Record:
    timing = outcome.timing
    found: Record = {"number": outcome.number, "kind": outcome.kind, "sent": round(outcome.sent - zero, 6)}
    found |= {"ended": round(outcome.ended - zero, 6), "chunks": outcome.chunks}
    if outcome.planned is not None:
        found["planned"] = round(outcome.planned - zero, 6)
    if timing is None:
        return {**found, "message": outcome.message}
    found |= {"prompt_tokens": timing.prompt_tokens, "completion_tokens": timing.completion_tokens}
    found |= {"usage": not outcome.counted, "ttft_ms": round(1000 * timing.first_token, 3)}
    found["tpot_ms"] = None if timing.per_token is None else round(1000 * timing.per_token, 3)
    return {**found, "itl_ms": [round(1000 * gap, 3) for gap in timing.gaps]} if details else found


def _failures(kind: str) -> Callable[[Point], str]:
    return lambda point: str(point.summary.failed.get(kind, 0))


def _interrupted(point: Point) -> str:
    return str(point.summary.interrupted)


def _goodput(point: Point) -> str:
    return report.show(point.summary.goodput or 0.0)


def _latency(name: str, figure: str) -> Callable[[Point], str]:
    def show(point: Point) -> str:
        found: Spread | None = getattr(point.summary, name)
        return "-" if found is None else report.show(getattr(found, figure))

    return show


def _accepted(point: Point, name: str) -> str:
    return "-" if point.acceptance is None else report.show(getattr(point.acceptance, name))


def _others(point: Point) -> str:
    cores = point.other_cores
    return f"{cores.before:.2f} {cores.during:.2f} {cores.after:.2f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
