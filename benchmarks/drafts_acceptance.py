"""How much of each drafter's drafts the target accepts: greedy answers to held-out prompts, full drafts verified.

Nothing is timed and no draft is cut, so the figures are the draft's own; answers run together to save time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.drafts_engine import Conditions, Served, Variant, run
from benchmarks.drafts_figures import Acceptance, Round, acceptance, whole_rounds
from benchmarks.drafts_options import Options, say
from benchmarks.drafts_prompts import greedy, questions
from engine.tokenizer.tokenizer import Tokenizer

EVERYTHING = "all"


@dataclass(frozen=True, slots=True)
class Accepted:
    """One drafter on one data set."""

    drafter: str
    prompts: str
    count: int
    figures: Acceptance
    chains: bool = True  # of a tree, no token has one position


def measure(folder: Path, options: Options) -> list[Accepted]:
    """Every drafter on every set, then on all of them together. Raises BenchmarkError."""
    texts = {source: questions(source, options.prompts) for source in options.sources}
    found: list[Accepted] = []
    for variant in options.variants:
        if variant.draft is not None:
            found += _drafter(folder, variant, texts, options)
    return found


def _drafter(folder: Path, variant: Variant, texts: Mapping[str, Sequence[str]], options: Options) -> list[Accepted]:
    served, tokenizer = Served(folder, variant.whole(), options.load), Tokenizer.load(folder)
    # A block more than is counted, so that no counted draft is cut at the end of its answer.
    spare = served.worker.capacity().traits.lookahead + 1
    found, everything = [], []
    for source, asked in texts.items():
        named = [(f"{source}-{i}", text) for i, text in enumerate(asked)]
        core = served.core(Conditions(seqs=options.clients))
        answered = run(core, greedy(tokenizer, named, options.tokens + spare))
        rounds = [kept for answer in answered.answers for kept in whole_rounds(answer.rounds, options.tokens)]
        everything += rounds
        found.append(_accepted(variant, source, len(asked), rounds))
        say(f"{variant.name:<14} {source:<10} {found[-1].figures.tokens_per_round:.2f} tokens per round")
    if len(texts) > 1:
        found.append(_accepted(variant, EVERYTHING, sum(map(len, texts.values())), everything))
    served.worker.close()
    return found


def _accepted(variant: Variant, source: str, count: int, rounds: Iterable[Round]) -> Accepted:
    chains = variant.draft is None or not variant.draft.tree
    return Accepted(variant.name, source, count, acceptance(rounds), chains)


def tables(found: Sequence[Accepted]) -> list[list[list[str]]]:
    """Tokens per round over drafter and data set; then the share that stood at each position, of all sets."""
    sets = list(dict.fromkeys(one.prompts for one in found))
    drafters = list(dict.fromkeys(one.drafter for one in found))
    chains = list(dict.fromkeys(one.drafter for one in found if one.chains))
    figures = {(one.drafter, one.prompts): one.figures for one in found}
    counts = {one.prompts: one.count for one in found}
    first = [["tokens per round", *(f"{source} ({counts[source]})" for source in sets)]]
    for name in drafters:
        first.append([name, *(report.show(figures[name, source].tokens_per_round) for source in sets)])
    last = sets[-1]
    longest = max((len(figures[name, last].offered) for name in chains), default=0)
    second = [[f"accepted at, of {last}", *(str(j + 1) for j in range(longest))]]
    for name in chains:
        for kind, shares in (
            ("", figures[name, last].by_position),
            (", given those before", figures[name, last].given_those_before),
        ):
            second.append([name + kind, *(f"{share:.2f}" for share in shares), *[""] * (longest - len(shares))])
    return [first, second]


def record(found: Sequence[Accepted]) -> list[dict[str, object]]:
    """For the JSON file: every count, and what follows from them."""
    return [
        {
            **asdict(one),
            "tokens_per_round": one.figures.tokens_per_round,
            "by_position": one.figures.by_position,
            "given_those_before": one.figures.given_those_before,
        }
        for one in found
    ]
