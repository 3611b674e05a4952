"""Ours beside a peer, in interleaved rounds of the scenarios of `benchmarks.serving`, and what came of it."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import report, serving
from benchmarks.client import Server
from benchmarks.peers.catalog import MODEL_NAME, PEERS, SLOT_CONTEXT, SLOTS, Peer
from benchmarks.peers.install import Place, installed_version, say, weights
from benchmarks.peers.residents import Resident, resident
from benchmarks.prompts import CountTokens, Prompts, licence_text
from benchmarks.scenarios import SCENARIOS, Metric, Scenario
from benchmarks.serving import Measurement
from engine.tokenizer.tokenizer import Tokenizer

OURS = "slipstream"
# The columns of the overview: scenario and figure.
COLUMNS = (("single", "decode"), ("prefix", "first_ms"), ("8 clients", "output"), ("32 clients", "output"))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run for each peer. `timeout` is for becoming ready, in seconds."""

    config: Path
    model: str
    scenarios: tuple[Scenario, ...]
    rounds: int
    new_tokens: int
    threads: int
    timeout: float
    seed: int


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two servers of a pair; memory in bytes."""

    name: str
    version: str
    command: tuple[str, ...]
    ready_seconds: float
    memory: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A peer under its name, with the name of its model."""

    name: str
    about: Peer
    model: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Ours and one peer, measured in turn."""

    peer: str
    ours: Side
    theirs: Side
    measurements: tuple[Measurement, ...]

    def ratios(self, scenario: str, metric: Metric) -> list[float]:
        """How many times better ours is, for each round."""
        ours, theirs = (serving.column(self.measurements, scenario, n, metric.key) for n in (OURS, self.peer))
        return report.paired_ratios(ours, theirs, higher_is_better=metric.higher_is_better)


def blanks(peer: Peer, place: Place, plan: Plan) -> dict[str, str]:
    """What is filled into a peer's command; the port stays open."""
    return {
        "python": str(place.python(peer.environment)),
        "script": str(Path(__file__).with_name(peer.script)),
        "folder": str(weights("folder", plan.model, place)),
        "weights": str(weights(peer.weights, plan.model, place)),
        "name": MODEL_NAME,
        "threads": str(plan.threads),
        "cores": ",".join(map(str, range(plan.threads))),
        "slots": str(SLOTS),
        "slot_context": str(SLOT_CONTEXT),
        "port": "{port}",
    }


def filled(peer: Peer, values: Mapping[str, str]) -> list[str]:
    """The command that starts a peer, its variables first."""
    parts = (*(("env",) if peer.variables else ()), *peer.variables, *peer.command)
    return [part.format(**values) for part in parts]


def shown(command: Sequence[str], place: Place) -> tuple[str, ...]:
    """A command for the record: where things lie on this machine is nobody's business."""
    places = {str(folder): f"{name.upper()}_VENV" for name, folder in place.venvs.items()}
    places |= {str(place.folder): "PEERS", str(place.cache_dir): "CACHE", str(report.ROOT): ".", sys.prefix: "VENV"}
    parts = ["python" if part == sys.executable else part for part in command]
    for folder, name in places.items():
        parts = [part.replace(folder, name) for part in parts]
    return tuple(part.replace(str(Path.home()), "~") for part in parts)


def our_command(plan: Plan) -> list[str]:
    return [sys.executable, "-m", "server", "serve", "--config", str(plan.config), "--port", "{port}"]


async def compare(name: str, ours: Resident, place: Place, plan: Plan) -> Pair:
    """Start the peer, measure both in turn, end the peer. Raises BenchmarkError."""
    peer, version = PEERS[name], installed_version(PEERS[name].environment, place)
    values = blanks(peer, place, plan)
    command = filled(peer, values)
    log = place.folder / f"{name}.log"
    say(f"{name}: starting {' '.join(command)}")
    with resident(command, log, peer.ready_path, plan.timeout) as theirs:
        say(f"{name}: ready after {theirs.launched.ready_seconds:.1f} s")
        measurements = await _measure(Contender(name, peer, peer.model.format(**values)), ours, theirs, place, plan)
        sides = (
            Side(OURS, report.git_commit(), shown(our_command(plan), place), ours.launched.ready_seconds, ours.peak),
            Side(name, version, shown(command, place), theirs.launched.ready_seconds, theirs.peak),
        )
        return Pair(name, *sides, tuple(measurements))


async def _measure(peer: Contender, ours: Resident, theirs: Resident, place: Place, plan: Plan) -> list[Measurement]:
    residents = {OURS: ours, peer.name: theirs}

    def turn(server: Server) -> AbstractAsyncContextManager[None]:
        return residents[server.name].turn(server)

    await ours.resume()
    try:
        async with Server(OURS, ours.launched.url) as found:
            model = found.model
    finally:
        ours.suspend()
    seed = plan.seed + list(PEERS).index(peer.name)  # ours must not know the prompts from the pair before
    prompts = Prompts(licence_text(), _counter(place, plan), seed)
    async with (
        Server(OURS, ours.launched.url, model=model) as first,
        Server(peer.name, theirs.launched.url, model=peer.model, ignore_eos=peer.about.ignore_eos) as second,
    ):
        return await serving.measure([first, second], plan.scenarios, prompts, plan.rounds, plan.new_tokens, turn)


def _counter(place: Place, plan: Plan) -> CountTokens:
    """Tokens are counted here: no server is woken for it."""
    tokenizer = Tokenizer.load(weights("folder", plan.model, place))

    async def count(text: str) -> int:
        return len(tokenizer.encode(text))

    return count


# ---- words -------------------------------------------------------------------------------------------------


def overview(pairs: Sequence[Pair], scenarios: Sequence[Scenario]) -> list[list[str]]:
    """A row for each peer: its median, ours in the same rounds, and the median of the rounds' ratios."""
    metrics = [
        (scenario, metric)
        for scenario in scenarios
        for metric in scenario.metrics
        if (scenario.name, metric.key) in COLUMNS
    ]
    head = ["", *(metric.title for _, metric in metrics), "ready, s", "memory, MB", "load beside, cores"]
    rows = [head]
    for pair in pairs:
        for side in (pair.theirs, pair.ours):
            cells = [report.spread(serving.column(pair.measurements, s.name, side.name, m.key)) for s, m in metrics]
            load = max(m.other_load for m in pair.measurements if m.server == side.name)
            tail = [report.show(side.ready_seconds), f"{side.memory / 1e6:,.0f}", f"{load:.2f}"]
            title = PEERS[side.name].title if side is pair.theirs else "  ours beside it"
            rows.append([f"{title} ({side.version})" if side is pair.theirs else title, *cells, *tail])
        ratios = [f"{statistics.median(pair.ratios(s.name, m)):.2f} x" for s, m in metrics]
        rows.append(["  ours is better", *ratios, "", "", ""])
    return rows


def record(pairs: Sequence[Pair], plan: Plan, began: str) -> dict[str, object]:
    """Everything, ready for JSON."""
    return {
        "commit": report.git_commit(),
        "machine": report.machine(),
        "began": began,
        "config": plan.config.name,
        "model": plan.model,
        "rounds": plan.rounds,
        "new_tokens": plan.new_tokens,
        "threads": plan.threads,
        "seed": plan.seed,
        "method": "interleaved rounds; all servers but the measured one stopped by SIGSTOP; memory is PSS after a turn",
        "pairs": [
            {
                **asdict(pair),
                "ratios": {
                    f"{scenario.name}: {metric.key}": pair.ratios(scenario.name, metric)
                    for scenario in plan.scenarios
                    for metric in scenario.metrics
                },
            }
            for pair in pairs
        ],
    }


def select(names: Sequence[str]) -> tuple[Scenario, ...]:
    """The scenarios of these names, in their order; all of them for none."""
    return tuple(scenario for scenario in SCENARIOS if not names or scenario.name in names)
