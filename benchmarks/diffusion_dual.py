"""DualDiffusion against its own drafter alone, at equal cost: accuracy over what the passes of a case cost.

Cost counts positions fed times the parameters of the linear layers of the model that they went through, so that a pass
of the drafter's open block and a verifier's whole pass are what they are. Alone, the drafter decodes with the very
rules that it drafts with, and with slower ones. Nothing is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.diffusion_engine import Served, answers, check
from benchmarks.diffusion_figures import Paired, Sample
from benchmarks.diffusion_options import Options
from benchmarks.diffusion_variants import Variant, Wish
from benchmarks.drafts_options import say
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_figures import Estimate
from benchmarks.verifiers_task import Group

ALONE = "drafter alone"
Key = tuple[str, str]  # series and variant
_LOOKED_UP = ("embed", "wte", "lm_head", "transformer.ff_out")


class Tensor(msgspec.Struct, frozen=True):
    """An entry of a safetensors header; its metadata has no shape."""

    shape: list[int] = []


@dataclass(frozen=True, slots=True)
class Point:
    """One way of decoding. `cost` of a case, in multiplications by weights; shares are of all tokens and forwards.

    `rival`: the drafter alone with most accuracy among those that cost no more, and `less` ours less that one's; empty
    where there is none as cheap.
    """

    series: str
    variant: str
    accuracy: Estimate
    cost: Estimate
    tokens_per_forward: Estimate
    verifies: float
    remasked: float
    rival: str = ""
    less: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Dual:
    """`parameters` of the linear layers: of the served model, and of a drafter that is another (0: none is)."""

    model: str
    drafter: str
    parameters: int
    draft_parameters: int
    cases: int
    points: tuple[Point, ...]

    @property
    def better(self) -> list[Point]:
        """Where DualDiffusion's accuracy is above the drafter's at no more cost, interval and all."""
        return [one for one in self.points if one.less is not None and one.less.low > 0]


@dataclass(frozen=True, slots=True)
class Arm:
    """One series: a loaded model and how it decodes."""

    series: str
    served: Served
    variants: tuple[Variant, ...]


def dual_arms(served: Served, drafts: Sequence[Variant], verifies: Iterable[Wish], steps: Sequence[int]) -> list[Arm]:
    """DualDiffusion with every verify, each with all drafts and numbers of draft steps."""
    arms = []
    for wish in verifies:
        for value in wish.values or (None,):
            threshold = -1.0 if value is None else value
            name = f"verify {wish.name}" + ("" if value is None else f" {value:g}")
            variants = tuple(
                replace(
                    draft,
                    name=f"{draft.name}, {count} steps",
                    params=replace(draft.params, drafter_steps=count, verify=wish.name, verify_threshold=threshold),
                )
                for count in steps
                for draft in drafts
            )
            arms.append(Arm(name, served, variants))
    return arms


def measure(arms: Sequence[Arm], group: Group, options: Options) -> dict[Key, list[Sample]]:
    """All answers. Raises BenchmarkError."""
    found: dict[Key, list[Sample]] = {}
    for arm in arms:
        check(arm.served, arm.served.asked(group, options.tokens), arm.variants)
    for arm in arms:
        say(arm.series)
        asked = arm.served.asked(group, options.tokens)
        for one in arm.variants:
            found[arm.series, one.name] = answers(arm.served, asked, one, options.clients).samples
    return found


def told(found: Mapping[Key, Sequence[Sample]], sizes: tuple[int, int], names: tuple[str, str]) -> Dual:
    """`sizes`: parameters of the served model, and of the drafter where that is another; `names` alike.

    A drafter alone is fed positions of its own, whoever served it.
    """
    parameters, draft_parameters = sizes
    small = draft_parameters or parameters

    def cost(series: str, one: Sample) -> float:
        return one.cost(small, small) if series == ALONE else one.cost(parameters, draft_parameters)

    keys = {f"{series}/{name}": (series, name) for series, name in found}
    paired = Paired({key: found[own] for key, own in keys.items()})
    costs = {
        key: paired.of(key, lambda one, series=series: (cost(series, one), 1))  # type: ignore[misc]
        for key, (series, _) in keys.items()
    }
    right = {key: paired.of(key, "accuracy") for key in keys}
    alone = [key for key, (series, _) in keys.items() if series == ALONE]
    points = []
    for key, (series, name) in keys.items():
        cheap = [other for other in alone if costs[other].value <= costs[key].value]
        rival = max(cheap, key=lambda other: right[other].value, default="") if series != ALONE else ""
        samples = found[series, name]
        forwards = sum(one.forwards + one.draft_forwards for one in samples)
        points.append(
            Point(
                series=series,
                variant=name,
                accuracy=right[key],
                cost=costs[key],
                tokens_per_forward=paired.of(key, "tokens_per_forward"),
                verifies=sum(one.verifies for one in samples) / max(forwards, 1),
                remasked=sum(one.remasked for one in samples) / max(sum(one.tokens for one in samples), 1),
                rival=keys[rival][1] if rival else "",
                less=paired.less(key, rival) if rival else None,
            )
        )
    return Dual(names[0], names[1], parameters, draft_parameters, paired.cases, tuple(points))


def parameters(folder: Path) -> int:
    """Of the matrices that every position is multiplied by: all but embeddings, and the head, which few rows see.

    Read from the headers of the safetensors files. Raises BenchmarkError.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = msgspec.json.decode(opened.read(int.from_bytes(opened.read(8), "little")), type=dict[str, Tensor])
        for name, one in header.items():
            if len(one.shape) == 2 and not any(part in name for part in _LOOKED_UP):
                total += math.prod(one.shape)
    if not total:
        raise BenchmarkError(f"{folder.name}: no safetensors file with matrices")
    return total
