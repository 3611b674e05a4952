"""What speculation gains and costs: one model with and without a drafter, in turn, in one process, without HTTP.

`python -m benchmarks.speculation [--draft ngram] [--tokens 128] [--rounds 3] [--json FILE]`. Answers that repeat their
prompt (code edits, summaries with quotes) are decoded greedily; ordinary ones at temperature 1, because a small model's
greedy text repeats itself. Decoding alone is timed: from each run's first token to its last, prompts cached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.processes import OtherLoad
from benchmarks.speculation_prompts import ORDINARY, REPEATING
from engine.config import DraftConfig, EngineConfig, KVConfig, ModelConfig
from engine.core import EngineCore
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR
from engine.protocols import WorkerFactory
from engine.registry import WORKERS
from engine.registry import resolve as look_up
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Run:
    """One batch decoded once."""

    tokens: int
    seconds: float
    steps: int
    drafted: int
    accepted: int

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Bench:
    """The same checkpoint served twice in this process: plainly and with a drafter."""

    def __init__(self, folder: Path, draft: DraftConfig) -> None:
        self._tokenizer = Tokenizer.load(folder)
        self._serial = 0
        plain = EngineConfig(model=ModelConfig(path=str(folder)), kv=KVConfig(memory="384MiB"))
        drafting = replace(plain, model=replace(plain.model, pipeline="speculative", draft=draft))
        factory: WorkerFactory = look_up(WORKERS, "local", "worker")  # type: ignore[assignment]
        self.cores = [
            EngineCore(factory(config, folder, lambda phase: print(f"  {phase.name}: {phase.detail}")), config)
            for config in (plain, drafting)
        ]

    def requests(self, prompts: Sequence[str], count: int, tokens: int, temperature: float) -> list[Request]:
        found = []
        for i in range(count):
            ids = self._tokenizer.encode_chat([{"role": "user", "content": prompts[i % len(prompts)]}])
            sampling = SamplingParams(max_tokens=tokens, temperature=temperature, seed=i, ignore_eos=True)
            found.append(Request(f"r{i}", tuple(ids), sampling))
        return found

    def run(self, core: EngineCore, requests: Sequence[Request]) -> tuple[Run, list[tuple[int, ...]]]:
        """Decode all requests together; the clock runs from the step that ends the last prompt."""
        self._serial += 1
        answers: dict[str, list[int]] = {}
        for request in requests:
            name = f"{self._serial}-{request.id}"
            answers[name] = []
            core.add(replace(request, id=name))
        begin, counted, before = 0.0, 0, core.stats()
        while core.has_work():
            for update in core.step().updates:
                answers[update.request_id] += update.token_ids
            if not begin and all(answers.values()):
                begin, counted, before = time.perf_counter(), sum(map(len, answers.values())), core.stats()
        seconds, after = time.perf_counter() - begin, core.stats()
        total = sum(map(len, answers.values())) - counted
        steps = after.steps - before.steps
        spent = Run(
            total,
            seconds,
            steps,
            after.spec_drafted - before.spec_drafted,
            after.spec_accepted - before.spec_accepted,
        )
        return spent, [tuple(answer) for answer in answers.values()]

    def compare(self, name: str, requests: Sequence[Request], rounds: int) -> dict[str, object]:
        """Alternate both ways after a warm-up that also fills the prefix cache; medians and paired ratios."""
        equal = self.run(self.cores[0], requests)[1] == self.run(self.cores[1], requests)[1]
        pairs: list[list[Run]] = []
        with OtherLoad(()) as others:
            for _ in range(rounds):
                pairs.append([self.run(core, requests)[0] for core in self.cores])
        ratios = [drafting.speed / plain.speed for plain, drafting in pairs]
        plain, drafting = (median(pair[i].speed for pair in pairs) for i in (0, 1))
        last = pairs[-1][1]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{name:23s} {plain:7.1f} {drafting:7.1f} tok/s  {median(ratios):.2f}x ({spread})"
            f"   {last.tokens / last.steps / len(requests):.2f} tokens per step and request,"
            f" {last.accepted} of {last.drafted} drafted accepted, same tokens: {equal}"
        )
        return {
            "scenario": name,
            "requests": len(requests),
            "plain": plain,
            "drafting": drafting,
            "ratio": median(ratios),
            "ratios": ratios,
            "same_tokens": equal,
            "runs": [[asdict(run) for run in pair] for pair in pairs],
            "other_processes_cores": others.cores,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft", default="ngram")
    parser.add_argument("--max-draft", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="scenarios whose names begin so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = resolve(options.model, CACHE_DIR.expanduser())
    bench = Bench(folder, DraftConfig(options.draft, max_draft=options.max_draft))
    scenarios: list[tuple[str, tuple[str, ...], int, float]] = [
        (f"repeating {i}, 1 stream", (prompt,), 1, 0.0) for i, prompt in enumerate(REPEATING)
    ]
    scenarios += [(f"ordinary {i}, 1 stream", (prompt,), 1, 1.0) for i, prompt in enumerate(ORDINARY)]
    for kind, prompts, temperature in (("repeating", REPEATING, 0.0), ("ordinary", ORDINARY, 1.0)):
        scenarios += [(f"{kind}, {count} streams", prompts, count, temperature) for count in (8, 32)]
    found = []
    for name, prompts, count, temperature in (row for row in scenarios if row[0].startswith(options.only)):
        requests = bench.requests(prompts, count, options.tokens, temperature)
        found.append(bench.compare(name, requests, options.rounds))
    for kind in ("repeating", "ordinary"):
        ratios = [float(str(row["ratio"])) for row in found if str(row["scenario"]).startswith(f"{kind} ")]
        if not ratios:
            continue
        print(f"{kind}, 1 stream: median {median(ratios):.2f}x, worst {min(ratios):.2f}x over {len(ratios)} prompts")
    if options.json:
        command = f"python -m benchmarks.speculation --tokens {options.tokens} --rounds {options.rounds}"
        command += f" --only '{options.only}'" if options.only else ""
        options.json.write_text(json.dumps({"command": command, "scenarios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
