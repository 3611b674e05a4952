"""The two passes of `slipstream bench verifiers` over one loaded pair: answers, and tokens per second.

The verifier is a setting of each request, so all variants take turns on one engine.

Answers: whole drafts, so that acceptance is the verifier's own, nothing timed, many at once; prompts are computed once
and found again. Speed: another engine over the same files, with drafts as long as pays, since that is how it is served.
What pays is learned from the rounds of all requests, so each variant runs for a moment before it is timed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.drafts_engine import Answer, Conditions, Run, Served, run
from benchmarks.drafts_figures import whole_rounds
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_figures import Sample
from benchmarks.verifiers_options import Options, say
from benchmarks.verifiers_task import Ending, Group, requests
from benchmarks.verifiers_variants import STRICT, Variant
from engine.core import EngineCore
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request, SamplingParams

WARM_UP_TOKENS = 16
LEAST = 3  # requests that are timed one after the other


@dataclass(frozen=True, slots=True)
class Speed:
    """One variant at one load: tokens per second behind the first step of each answer, of every round."""

    temperature: float
    group: str
    batch: int
    variant: str
    speeds: tuple[float, ...]
    tokens_per_round: float


Asked = tuple[float, str, str]  # temperature, group and variant


def answers(
    served: Served, tokenizer: Tokenizer, variants: Sequence[Variant], groups: Sequence[Group], options: Options
) -> dict[Asked, list[Sample]]:
    """Every variant's answers to every question, at every temperature. Raises BenchmarkError."""
    core = served.core(Conditions(seqs=options.clients, prefix_cache=True))
    spare = served.worker.capacity().traits.lookahead + 1  # so that no counted draft is cut by the answer's end
    found: dict[Asked, list[Sample]] = {}
    for temperature in options.temperatures:
        samples = options.samples if temperature > 0 else 1
        for group in groups:
            limit, ending = group.max_tokens or options.tokens, Ending(tokenizer, group.stop)
            sampling = SamplingParams(max_tokens=limit + spare, temperature=temperature, logprobs=0)
            for variant in (one for one in variants if one.at(temperature)):
                asked = requests(group, tokenizer, sampling, samples, f"{temperature:g}/{variant.name}")
                answered = run(core, verified(asked, variant), ended=ending.reached).answers
                taken = [
                    sample(answer, number // samples, group, ending, limit) for number, answer in enumerate(answered)
                ]
                found[temperature, group.name, variant.name] = taken
                say(f"{temperature:g}  {group.name:<10} {variant.name:<24} {sum(len(s.tokens) for s in taken)} tokens")
            if temperature == 0:
                _beside_strict(found, group)
    return found


def verified(asked: Iterable[Request], variant: Variant) -> list[Request]:
    """The same requests under a verifier."""
    return [replace(one, speculation=variant.wish) for one in asked]


def sample(answer: Answer, prompt: int, group: Group, ending: Ending, limit: int) -> Sample:
    """What counts of an answer: its first `limit` tokens, up to a stop string, and the rounds that began among them."""
    tokens = answer.tokens[:limit]
    tokens = tokens[: ending.length(tokens)]
    score, scored = group.questions[prompt].score, answer.scored[: len(tokens)]
    return Sample(
        prompt=prompt,
        tokens=tuple(tokens),
        rounds=tuple(whole_rounds(answer.rounds, len(tokens) - 1)),  # the first token came before them
        nll=-sum(one.logprob for one in scored),
        best=sum(one.rank == 1 for one in scored),
        bias=sum(answer.bias[: len(tokens)]),
        score=None if score is None else score(ending.text(tokens)),
    )


def _beside_strict(found: dict[Asked, list[Sample]], group: Group) -> None:
    """Compare all greedy answers with the strict ones."""
    strict = found[0.0, group.name, STRICT]
    for key, samples in found.items():
        if key[:2] == (0.0, group.name):
            found[key] = [one.beside(other.tokens) for one, other in zip(samples, strict, strict=True)]


def speeds(
    served: Served, tokenizer: Tokenizer, variants: Sequence[Variant], group: Group, options: Options
) -> list[Speed]:
    """Tokens per second of every variant, in turns: within a round all answer the same, another first each time."""
    ending, found = Ending(tokenizer, group.stop), list[Speed]()
    for temperature in options.temperatures:
        chosen = [one for one in variants if one.at(temperature)]
        sampling = SamplingParams(max_tokens=options.speed_tokens, temperature=temperature)
        pool = requests(group, tokenizer, sampling, 1, f"{temperature:g}")
        for batch in options.batches:
            runs: dict[str, list[list[Run]]] = {one.name: [] for one in chosen}
            turns, size = deque(chosen), max(batch, LEAST)
            for number in range(options.rounds):
                asked = [pool[i % len(pool)] for i in range(number * size, (number + 1) * size)]
                for variant in turns:
                    core = served.core(Conditions(seqs=max(batch, 2), prefix_cache=True))
                    runs[variant.name].append(_timed(core, verified(asked, variant), batch, ending))
                turns.rotate(-1)
                say(f"{temperature:g}  {batch} at once, round {number + 1} of {options.rounds}")
            found += [
                Speed(temperature, group.name, batch, name, tuple(map(rate, own)), _length(own))
                for name, own in runs.items()
            ]
    return found


def _timed(core: EngineCore, asked: Sequence[Request], batch: int, ending: Ending) -> list[Run]:
    """Requests that come `batch` at once, after a moment of the same."""
    short = [
        replace(one, id=f"warm-up/{i}", sampling=replace(one.sampling, max_tokens=WARM_UP_TOKENS))
        for i, one in enumerate(asked)
    ]
    run(core, short[:batch])
    named = [replace(one, id=f"{one.id}/{i}") for i, one in enumerate(asked)]  # few questions come round again
    return [run(core, named[i : i + batch], ended=ending.reached) for i in range(0, len(named), batch)]


def rate(parts: Sequence[Run]) -> float:
    """Tokens per second behind the first step of each answer, from a part's first token to its last.

    Raises BenchmarkError where no answer has a second token.
    """
    tokens = sum(one.tokens for part in parts for answer in part.answers for one in answer.rounds)
    seconds = sum(max(a.last for a in part.answers) - min(a.first for a in part.answers) for part in parts)
    if not tokens or not seconds:
        raise BenchmarkError("answers of one token can't be timed; use --speed none or other --sources")
    return tokens / seconds


def _length(runs: Iterable[Iterable[Run]]) -> float:
    """Tokens per round."""
    rounds = [one for parts in runs for part in parts for answer in part.answers for one in answer.rounds]
    return sum(one.tokens for one in rounds) / len(rounds) if rounds else 0.0
