"""Tables and the record of `slipstream bench verifiers`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks import report
from benchmarks.drafts_figures import Ratio, paired
from benchmarks.verifiers_engine import Asked, Speed
from benchmarks.verifiers_figures import Bootstrap, Estimate, Sample, changes, estimates, histogram
from benchmarks.verifiers_task import Group
from benchmarks.verifiers_variants import STRICT, Variant

NOTES = (
    "In brackets: 95 % intervals, bootstrap over prompts. Speeds: medians of rounds; x strict: the median of ratios "
    "within rounds, and their range.",
    "Bias: mean estimated distance of each token's law from the target's, in total variation. Perplexity: of the "
    "answers, under the target at temperature 1; drawing at another temperature moves it for all verifiers alike. "
    "Target's best: tokens that are the target's most likely one after the same prefix.",
    "At temperature 0 a relaxed verifier is another decoder, not the target's greedy one: equal answers and equal "
    "tokens (those before the first difference) are beside strict's.",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One variant's answers to one group of questions at one temperature. `changes`: less those of strict."""

    temperature: float
    group: str
    variant: Variant
    prompts: int
    answers: int
    histogram: tuple[int, ...]
    estimates: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was measured."""

    rows: tuple[Row, ...]
    speeds: tuple[Speed, ...]

    def speed(self, row: Row, batch: int) -> Speed | None:
        key = (row.temperature, row.group, batch, row.variant.name)
        return next((one for one in self.speeds if (*_load(one), one.variant) == key), None)

    def ratio(self, one: Speed) -> Ratio:
        """Over strict, within rounds."""
        strict = next(other for other in self.speeds if _load(other) == _load(one) and other.variant == STRICT)
        return paired(one.speeds, strict.speeds)

    @property
    def batches(self) -> list[int]:
        return list(dict.fromkeys(one.batch for one in self.speeds))


def _load(one: Speed) -> tuple[float, str, int]:
    return one.temperature, one.group, one.batch


def rows(found: Mapping[Asked, Sequence[Sample]], variants: Sequence[Variant], groups: Sequence[Group]) -> list[Row]:
    """Measures of all answers; those of one group share their resamples."""
    by_name, sizes = {one.name: one for one in variants}, {one.name: len(one.questions) for one in groups}
    bootstraps = {name: Bootstrap(size) for name, size in sizes.items()}
    return [
        Row(
            temperature,
            group,
            by_name[name],
            sizes[group],
            len(samples),
            histogram(samples),
            estimates(bootstraps[group], samples),
            changes(bootstraps[group], samples, found[temperature, group, STRICT]),
        )
        for (temperature, group, name), samples in found.items()
    ]


def tables(found: Found) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows: one table for each temperature and group of questions."""
    keys = dict.fromkeys((row.temperature, row.group) for row in found.rows)
    return [_table(found, [row for row in found.rows if (row.temperature, row.group) == key]) for key in keys]


def _table(found: Found, own: Sequence[Row]) -> tuple[str, list[list[str]]]:
    first, greedy = own[0], own[0].temperature == 0
    scored = not math.isnan(first.estimates["score"].value)
    head = ["verifier", "tokens per round", "accepted, %", "bias"]
    head += ["score", "less strict's"] * scored
    head += ["perplexity", "target's best, %"]
    head += ["equal answers, %", "equal tokens, %"] * greedy
    batches = [batch for batch in found.batches if found.speed(first, batch) is not None]
    for batch in batches:
        head += [f"tok/s, {batch} at once", "x strict"]
    lines = [head]
    for row in own:
        see, cells = row.estimates, [row.variant.name]
        cells += [_cell(see["tokens_per_round"]), _cell(see["acceptance"], 100), _cell(see["bias"], digits=4)]
        cells += [_cell(see["score"], digits=3), _cell(row.changes["score"], digits=3)] * scored
        cells += [_cell(see["perplexity"]), _cell(see["target_best"], 100)]
        cells += [_cell(see["equal_answers"], 100), _cell(see["equal_tokens"], 100)] * greedy
        for batch in batches:
            speed = found.speed(row, batch)
            cells += ["-", "-"] if speed is None else [report.spread(speed.speeds), str(found.ratio(speed))]
        lines.append(cells)
    title = f"temperature {first.temperature:g}, {first.group}: {first.prompts} questions"
    return f"{title}, {first.answers} answers of each verifier", lines


def _cell(estimate: Estimate, scale: float = 1.0, digits: int | None = None) -> str:
    """Value and interval: 2.10 (1.95-2.26)."""
    if math.isnan(estimate.value):
        return "-"
    digits = (1 if scale > 1 else 2) if digits is None else digits
    value, low, high = (f"{scale * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def record(found: Found) -> dict[str, object]:
    """For the JSON file; what is not known is null."""
    return {
        "answers": [
            {
                "temperature": row.temperature,
                "group": row.group,
                "variant": row.variant.name,
                "verifier": row.variant.verifier,
                "knobs": dict(row.variant.wish.knobs),
                "drawn": row.variant.drawn,
                "bias_bound": row.variant.wish.bias_bound,
                "prompts": row.prompts,
                "answers": row.answers,
                "histogram": row.histogram,
                **{name: _plain(one) for name, one in row.estimates.items()},
                "less_strict": {name: _plain(one) for name, one in row.changes.items()},
            }
            for row in found.rows
        ],
        "speeds": [{**asdict(one), "over_strict": asdict(found.ratio(one))} for one in found.speeds],
    }


def _plain(estimate: Estimate) -> dict[str, float] | None:
    return None if math.isnan(estimate.value) else asdict(estimate)
