"""Sets up other servers and measures ours beside them.

    python -m benchmarks.peers setup llamacpp-f16 llamacpp-q8_0 vllm
    python -m benchmarks.peers run llamacpp-f16 llamacpp-q8_0 vllm --rounds 5 --json out.json --markdown out.md
    python -m benchmarks.peers list

Nothing else should run on the machine. Every peer is measured against ours in rounds of its own: ours, peer, peer,
ours and so on, with the same prompts, and only the measured server runs (see residents.py). Run it from the top of
the repository.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.peers.catalog import ENVIRONMENTS, PEERS
from benchmarks.peers.compare import OURS, Pair, Plan, compare, our_command, overview, record, select
from benchmarks.peers.install import Place, install, say, weights
from benchmarks.peers.residents import resident
from benchmarks.scenarios import NEW_TOKENS, SCENARIOS
from benchmarks.serving import speed_table
from benchmarks.stream import BenchmarkError
from engine.config import load
from engine.errors import SlipstreamError

CACHE = Path("~/.cache/slipstream")


async def run(plan: Plan, names: Sequence[str], place: Place) -> list[Pair]:
    """Ours stays up, each peer comes and goes. A peer that fails is told and left out."""
    pairs = []
    place.folder.mkdir(parents=True, exist_ok=True)
    with resident(our_command(plan), place.folder / f"{OURS}.log", "/ready", plan.timeout) as ours:
        for name in names:
            try:
                pairs.append(await compare(name, ours, place, plan))
            except BenchmarkError as error:
                say(f"error: {name}: {error}")
                continue
            say(report.table(speed_table(pairs[-1].measurements, plan.scenarios, [OURS, name])))
    return pairs


def set_up(arguments: argparse.Namespace, place: Place) -> int:
    for name in dict.fromkeys(PEERS[peer].environment for peer in arguments.peers):
        install(name, place, arguments.torch_index)
    model = load(arguments.config).engines()[0].model.path
    for kind in dict.fromkeys(PEERS[peer].weights for peer in arguments.peers):
        say(f"weights ({kind}): {weights(kind, model, place)}")
    return 0


def run_all(arguments: argparse.Namespace, place: Place) -> int:
    began, model = time.strftime("%Y-%m-%dT%H:%M:%S%z"), load(arguments.config).engines()[0].model.path
    plan = Plan(
        config=arguments.config,
        model=model,
        scenarios=select(arguments.only or ()),
        rounds=arguments.rounds,
        new_tokens=arguments.tokens,
        threads=arguments.threads,
        timeout=arguments.timeout,
        seed=arguments.seed,
    )
    pairs = asyncio.run(run(plan, arguments.peers, place))
    if not pairs:
        return 1
    if arguments.json:
        text = msgspec.json.encode(record(pairs, plan, began))
        arguments.json.write_bytes(msgspec.json.format(text) + b"\n")
    table = report.markdown_table(overview(pairs, plan.scenarios))
    about = (
        f"{report.machine()}; commit {report.git_commit()}; median (lowest-highest) of {plan.rounds} rounds; {began}"
    )
    if arguments.markdown:
        arguments.markdown.write_text(f"{table}\n\n{about}\n", encoding="utf-8")
    print(f"{table}\n\n{about}")
    return 0 if len(pairs) == len(arguments.peers) else 1


def list_all(_arguments: argparse.Namespace, _place: Place) -> int:
    print(report.table([["name", "what it is"], *([name, peer.title] for name, peer in PEERS.items())]))
    return 0


def venv_of(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if name not in ENVIRONMENTS or not separator or not (Path(path) / "bin" / "python").exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER of an environment of {', '.join(ENVIRONMENTS)}")
    return name, Path(path).absolute()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").partition("\n")[0])
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list", help="the peers that are known").set_defaults(use=list_all)
    setup = commands.add_parser("setup", help="install peers and write their weights")
    setup.add_argument("--torch-index", default="", metavar="URL", help="an index with CPU-only builds of torch")
    setup.set_defaults(use=set_up)
    running = commands.add_parser("run", help="measure ours beside each of them")
    running.set_defaults(use=run_all)
    running.add_argument("--rounds", type=_count, default=3, help="default: %(default)s")
    running.add_argument("--tokens", type=_count, default=NEW_TOKENS, help="new tokens per request (%(default)s)")
    running.add_argument("--threads", type=_count, default=2, help="of each peer; ours is the config's (%(default)s)")
    running.add_argument("--only", action="append", choices=[s.name for s in SCENARIOS], help="may be given again")
    running.add_argument("--timeout", type=float, default=900.0, help="seconds to become ready (%(default)s)")
    running.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000, help="default: from the clock")
    running.add_argument("--json", type=Path, metavar="FILE", help="where to write every single figure")
    running.add_argument("--markdown", type=Path, metavar="FILE", help="where to write the table")
    for command in (setup, running):
        command.add_argument("peers", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
        command.add_argument("--folder", type=Path, default=CACHE / "peers", help="of the peers (%(default)s)")
        command.add_argument(
            "--venv", type=venv_of, action="append", default=[], metavar="NAME=FOLDER", help="of yours"
        )
        command.add_argument("--config", type=Path, default=report.ROOT / "configs" / "demo.yaml", help="ours")
        command.add_argument("--cache-dir", type=Path, default=CACHE, help="our server's own setting")
    return made


def main() -> int:
    arguments = parser().parse_args()
    folder, cache = (getattr(arguments, name, CACHE).expanduser().absolute() for name in ("folder", "cache_dir"))
    place = Place(folder, cache, dict(getattr(arguments, "venv", [])))
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # a `finally` ends the servers
    try:
        code: int = arguments.use(arguments, place)
        return code
    except (BenchmarkError, SlipstreamError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
