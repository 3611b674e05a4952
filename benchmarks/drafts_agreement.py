"""Greedy answers with drafts, beside the answers of the same model without: token for token.

Alone, batched, in chunks, late, preempted, and over prefixes that a request without drafts has left in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.drafts_engine import Conditions, Run, Served, run
from benchmarks.drafts_figures import Agreement, agreement
from benchmarks.drafts_options import NONE, Options, say
from benchmarks.drafts_prompts import greedy, mixed
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request, SpeculationParams


@dataclass(frozen=True, slots=True)
class Rung:
    """One drafter under one kind of disturbance."""

    drafter: str
    condition: str
    found: Agreement
    tokens_per_round: float
    preemptions: int
    cached_tokens: int


def measure(folder: Path, options: Options) -> list[Rung]:
    """The reference once, then every drafter under every condition. Raises BenchmarkError."""
    tokenizer = Tokenizer.load(folder)
    named = mixed(options.sources, options.prompts)
    plain = Served(folder, NONE, options.load)
    say(f"reference: {len(named)} answers without drafts, one after the other")
    reference = run(plain.core(Conditions()), greedy(tokenizer, named, options.tokens, logprobs=True), clients=1)
    plain.worker.close()
    del plain
    requests = greedy(tokenizer, named, options.tokens)
    found = []
    for variant in options.variants:
        if variant.draft is None:
            continue
        served = Served(folder, variant.whole(), options.load)
        for condition in CONDITIONS:
            answered = _run(served, condition, requests, options.clients)
            rung = compare(variant.name, condition, reference, answered)
            say(f"{variant.name:<14} {condition:<12} {rung.found.words(options.quant)}")
            found.append(rung)
        served.worker.close()
    return found


CONDITIONS = ("alone", "batched", "chunked", "one step late", "preempted", "prefix hits")


def _run(served: Served, condition: str, requests: Sequence[Request], clients: int) -> Run:
    """All requests under one condition."""
    base = Conditions(seqs=clients)
    match condition:
        case "alone":
            return run(served.core(base), requests, clients=1)
        case "chunked":
            return run(served.core(replace(base, chunk=4 * clients)), requests)
        case "one step late":
            return run(served.core(replace(base, lag=1)), requests)
        case "preempted":
            return _preempted(served, base, requests)
        case "prefix hits":
            core = served.core(replace(base, prefix_cache=True))
            silent = SpeculationParams(enabled=False)
            run(core, [replace(one, id=f"{one.id}, before", speculation=silent) for one in requests])
            return run(core, requests)
    return run(served.core(base), requests)


def _preempted(served: Served, base: Conditions, requests: Sequence[Request]) -> Run:
    """With as many blocks as leave somebody without: how many that is hangs on the lengths of drafts and answers."""
    for part in (2, 3, 4):
        answered = run(served.core(replace(base, num_blocks=scarce(served, requests, base.seqs, part))), requests)
        if answered.stats.preemptions:
            break
    return answered


def scarce(served: Served, requests: Sequence[Request], clients: int, part: int) -> int:
    """Blocks that hold the longest request, or a half, third ... of what so many need at their end."""
    needs = [len(one.prompt_ids) + one.sampling.max_tokens + 1 for one in requests]
    together = sum(sorted(needs)[-clients:]) // part
    return -(-max(*needs, together) // served.worker.capacity().block_size) + 1


def compare(drafter: str, condition: str, reference: Run, answered: Run) -> Rung:
    """Answers of the same requests, with those of the reference."""
    names = [answer.request.id for answer in reference.answers]
    gaps = [answer.gaps for answer in reference.answers]
    rounds = [one for answer in answered.answers for one in answer.rounds]
    return Rung(
        drafter=drafter,
        condition=condition,
        found=agreement(reference.tokens, answered.tokens, names, gaps),
        tokens_per_round=sum(one.tokens for one in rounds) / len(rounds) if rounds else 0.0,
        preemptions=sum(answer.preemptions for answer in answered.answers),
        cached_tokens=sum(answer.cached_tokens for answer in answered.answers),
    )


def tables(found: Sequence[Rung], quant: str) -> list[list[list[str]]]:
    """A condition that did not come about has shown nothing: the last column tells."""
    rows = [["greedy with drafts", "answers", "equal", "part at a near-tie", "part elsewhere", "tokens per round"]]
    rows[0].append("disturbed by")
    for rung in found:
        ties, parted = rung.found.near_ties(quant), len(rung.found.differences)
        counts = (rung.found.of, rung.found.equal, ties, parted - ties)
        disturbed = {
            "preempted": f"{rung.preemptions} preemptions",
            "prefix hits": f"{rung.cached_tokens:,} tokens found",
        }.get(rung.condition, "")
        rows.append([f"{rung.drafter}, {rung.condition}", *map(str, counts), f"{rung.tokens_per_round:.2f}", disturbed])
    return [rows]


def record(found: Sequence[Rung]) -> list[dict[str, object]]:
    return [asdict(rung) for rung in found]
