"""Tables and the record of `slipstream bench diffusion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.diffusion_batch import Batch
from benchmarks.diffusion_dual import Dual
from benchmarks.diffusion_rules import Part, Row, Swept
from benchmarks.diffusion_speed import Cached, Timed
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_figures import Estimate

Table = tuple[str, list[list[str]]]  # a title, and rows
NOTES = (
    "In brackets: 95 % intervals, paired bootstrap over cases; of speeds and times: the range of rounds. Tokens per "
    "forward: tokens of answers over passes, those over prompts among them.",
    "Best at equal accuracy: most tokens per forward of all knobs that are no more than a point less accurate than the "
    "reference; the interval chooses anew in each resample.",
)


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured, part by part."""

    rules: Swept | None = None
    caches: Cached | None = None
    speed: Timed | None = None
    batch: tuple[Batch, ...] = ()
    dual: Dual | None = None


def tables(found: Found) -> list[Table]:
    """Titles and rows of everything that is there."""
    told: list[Table] = []
    if found.rules is not None:
        reference = found.rules.reference
        for part in found.rules.parts:
            told += [_rows(f"{part.name}: {part.cases} cases", part.rows, reference), _best(part, reference)]
            told += [_matches(part)] if part.matches else []
        told.append(_histogram(found.rules))
    if found.caches is not None:
        told.append(_rows(f"by cache: {found.caches.cases} cases", found.caches.rows, found.caches.reference))
    if found.speed is not None:
        told.append(_speeds(found.speed))
    if found.batch:
        told += [_batch(found.batch), _profile(found.batch)]
    if found.dual is not None:
        told.append(_dual(found.dual))
    return told


def _rows(title: str, rows: Sequence[Row], reference: str) -> Table:
    head = ["rule", "cache", "accuracy, %", f"less {reference}", "tokens per forward", "times", "forwards", "tokens"]
    lines = [head]
    for one in rows:
        cells = [cell(one.accuracy, 100, 1), cell(one.less, 100, 1), cell(one.tokens_per_forward), cell(one.times)]
        lines.append([one.variant, one.cache, *cells, f"{one.forwards.value:.1f}", f"{one.tokens.value:.1f}"])
    return title, lines


def _best(part: Part, reference: str) -> Table:
    lines = [["rule", "best", "tokens per forward", f"less {reference}, points", "times"]]
    for rule, one in part.best.items():
        if one is None:
            lines.append([rule, "none", "-", "-", "-"])
        else:
            name = one.name.removeprefix(rule).strip() or one.name
            lines.append([rule, name, cell(one.tokens_per_forward), cell(one.less, 100, 1), cell(one.times)])
    return f"{part.name}: best of each rule at equal accuracy", lines


def _matches(part: Part) -> Table:
    head = ["Frechet", "factor", "tokens per forward, times", "forwards, times", "accuracy, points"]
    lines = [[*head, "cases with fewer forwards", "as many", "more"]]
    for one in part.matches:
        cells = [cell(one.times, digits=3), cell(one.forwards, digits=3), cell(one.less, 100, 1)]
        lines.append([one.frechet, one.factor, *cells, str(one.fewer), str(one.same), str(one.more)])
    return f"{part.name}: Frechet's rule over the factor rule at the matching knob", lines


def _histogram(swept: Swept) -> Table:
    head = ["run", "candidates seen", *(f">= {level:g}, %" for level, _ in swept.histograms[0].above)]
    lines = [head]
    for one in swept.histograms:
        lines.append([one.variant, f"{one.total:,}", *(f"{100 * share:.1f}" for _, share in one.above)])
    return "confidences at candidate places", lines


def _speeds(timed: Timed) -> Table:
    lines = [["at once", "cache", "rule", "tok/s", "times", "times plain", "tokens per forward"]]
    for one in timed.speeds:
        plain = "-" if one.times_plain is None else str(one.times_plain)
        cells = [report.spread(one.speeds), str(one.times), plain, f"{one.tokens_per_forward:.2f}"]
        lines.append([str(one.batch), one.cache, one.variant, *cells])
    return f"speed, up to {timed.tokens} tokens", lines


def _batch(found: Sequence[Batch]) -> Table:
    head = ["rule", "cache", "one by one, s", "at once, s", "times", "products, s", "their share"]
    lines = [[*head, "with attention's", "rows of a pass", "equal answers"]]
    for one in found:
        cells = [report.spread(one.one_by_one), report.spread(one.at_once), str(one.ratio), report.spread(one.products)]
        cells += [
            str(one.share),
            str(one.share_all),
            f"{one.rows:.0f} ({one.scored:.0f} scored)",
            f"{one.equal} of {one.requests}",
        ]
        lines.append([one.variant, one.cache, *cells])
    return f"{found[0].requests} requests at once against one by one", lines


def _profile(found: Sequence[Batch]) -> Table:
    """Of the time of a watched run, in percent."""
    names = list(found[0].parts)
    lines = [["rule", "cache", *(f"{name}, %" for name in names), "GFLOP of a pass", "passes"]]
    for one in found:
        total = sum(one.parts.values())
        shares = [f"{100 * one.parts[name] / total:.0f}" for name in names]
        lines.append([one.variant, one.cache, *shares, f"{one.gflops:.2f}", str(one.passes)])
    return "where the time of requests at once goes", lines


def _dual(found: Dual) -> Table:
    head = ["series", "drafts", "accuracy, %", "cost, 10^9", "tokens per forward", "verifies, %", "taken back, %"]
    lines = [[*head, "drafter alone at no more cost", "points above it"]]
    for one in found.points:
        cells = [cell(one.accuracy, 100, 1), cell(one.cost, 1e-9), cell(one.tokens_per_forward)]
        cells += [f"{100 * one.verifies:.0f}", f"{100 * one.remasked:.1f}"]
        lines.append(
            [one.series, one.variant, *cells, one.rival or "-", "-" if one.less is None else cell(one.less, 100, 1)]
        )
    return f"DualDiffusion and its drafter alone: {found.cases} cases", lines


def cell(one: Estimate, scale: float = 1.0, digits: int = 2) -> str:
    """Value and interval: 2.10 (1.95 to 2.26)."""
    value, low, high = (f"{scale * x:.{digits}f}" for x in (one.value, one.low, one.high))
    return f"{value} ({low} to {high})"


def read(file: Path) -> Found:
    """What a record holds. Raises BenchmarkError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Record).found
    except (OSError, msgspec.MsgspecError) as error:
        raise BenchmarkError(f"--draw {file}: {error}") from error


def merged(records: Sequence[Found]) -> Found:
    """All parts that any of the records has, the last one's where several have it."""
    names = ("rules", "caches", "speed", "batch", "dual")
    return Found(**{name: part for one in records for name in names if (part := getattr(one, name))})


class _Record(msgspec.Struct):
    found: Found
