"""The verifiers of the registry over the toy target of `tests.sequences`, and what law each of them should write there.

The rules are written down here once more, from their formulas and for one position at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from engine.pipelines.speculative import SpeculativePipeline
from engine.protocols import Verifier
from engine.registry import VERIFIERS, resolve
from engine.types import Request, SpeculationParams
from engine.verifiers.strict import StrictVerifier
from tests.sequences import SegmentDrafter, SegmentRunner, Segments

SEGMENTS = Segments(1)
# Far from neutral, so that a rule that is not in force shows.
KNOBS: dict[str, dict[str, float]] = {
    "ensemble": {"target_weight": 0.2},
    "diversed": {"min_weight": 0.25},
    "bounded": {"epsilon": 0.25},
    "lenient": {"lenience": 0.4},
    "typical": {"posterior_threshold": 0.25, "posterior_alpha": 0.4},
    "top_k_gap": {"relaxed_topk": 2, "relaxed_delta": 0.9},
}
NEUTRAL: dict[str, dict[str, float]] = {
    "ensemble": {"target_weight": 1.0},
    "diversed": {"min_weight": 1.0},
    "bounded": {"epsilon": 0.0},
    "lenient": {"lenience": 1.0},
}


class ToyHead:
    """See `protocols.VerifierHead`: a weight that depends on both states."""

    def weights(self, hidden: Tensor, states: Tensor) -> Tensor:
        return torch.sigmoid(hidden[..., 0] - states[..., 1])


def made(name: str) -> Verifier:
    kind = resolve(VERIFIERS, name, "verifier")
    return cast(Verifier, kind(ToyHead()) if name == "diversed" else kind())  # type: ignore[operator]


def verifiers(*names: str) -> list[Verifier]:
    """Those of the registry, these first."""
    return [made(name) for name in (*names, *(name for name in VERIFIERS if name not in names))]


def served_by(default: Verifier, kind: str = "chain", knobs: Mapping[str, float] | None = None) -> SpeculativePipeline:
    """The toy target, drafted for; this verifier is the server's, and drafts are drawn where it weighs laws."""
    return pipeline([default, StrictVerifier()], kind, knobs, sample=default.card.drawn)


def pipeline(
    offered: Sequence[Verifier], kind: str = "chain", knobs: Mapping[str, float] | None = None, *, sample: bool = False
) -> SpeculativePipeline:
    drafter = SegmentDrafter(SEGMENTS, kind)
    return SpeculativePipeline(SegmentRunner(SEGMENTS), drafter, offered, drafter.most, knobs=knobs, sample=sample)


def under(request: Request, name: str, *, sample: bool = False, **wishes: object) -> Request:
    """The request with this verifier and its settings above."""
    knobs = tuple(KNOBS.get(name, {}).items())
    wish = SpeculationParams(verifier=name, knobs=knobs, sample=sample, **wishes)  # type: ignore[arg-type]
    return replace(request, id=f"{request.id} {name} {sample}", speculation=wish)


def tables(temperature: float) -> tuple[Tensor, Tensor]:
    """p and q after each context, [contexts, vocabulary] float64."""
    p, q = ((logits.double() / temperature).softmax(1) for logits in (SEGMENTS.target, SEGMENTS.draft))
    return p, q


def law(name: str, temperature: float, drawn: bool) -> Tensor:
    """Of a token at a drafted position behind each context, [contexts, vocabulary]."""
    p, q = tables(temperature)
    weights = ToyHead().weights(SEGMENTS.draft, SEGMENTS.target).double()
    rule = _drawn if drawn else _chosen
    return torch.stack([rule(name, p[c], q[c], float(weights[c])) for c in range(len(p))])


def _chosen(name: str, p: Tensor, q: Tensor, weight: float) -> Tensor:
    """p with the draft's likeliest token raised to the mass that the rule has for it."""
    token = int(q.argmax())
    mass = raised(name, p, float(q[token]), token, weight)
    out = p * (1 - mass) / (1 - p[token])
    out[token] = mass
    return out


def raised(name: str, p: Tensor, q: float, token: int, weight: float) -> float:
    own, knobs = float(p[token]), KNOBS[name]
    match name:
        case "ensemble":
            return max(own, knobs["target_weight"] * own + (1 - knobs["target_weight"]) * q)
        case "diversed":
            weight = max(weight, knobs["min_weight"])
            return max(own, weight * own + (1 - weight) * q)
        case "bounded":
            return max(own, min(q, own + knobs["epsilon"]))
        case "lenient":
            return min(1.0, own / knobs["lenience"])
    return 1.0 if _passes(name, p)[token] else own


def _passes(name: str, p: Tensor) -> Tensor:
    """Which tokens always stand."""
    knobs = KNOBS[name]
    if name == "typical":
        entropy = -float((p * p.log()).sum())
        return p > min(knobs["posterior_threshold"], knobs["posterior_alpha"] * 2.718281828459045**-entropy)
    assert name == "top_k_gap"
    rank = (p.unsqueeze(0) > p.unsqueeze(1)).sum(1)
    return (rank < knobs["relaxed_topk"]) & (p.log() >= p.max().log() - knobs["relaxed_delta"])


def _drawn(name: str, p: Tensor, g: Tensor, weight: float) -> Tensor:
    knobs = KNOBS[name]
    distance = float((p - g).abs().sum() / 2)
    match name:
        case "ensemble":
            return knobs["target_weight"] * p + (1 - knobs["target_weight"]) * g
        case "diversed":
            weight = max(weight, knobs["min_weight"])
            return weight * p + (1 - weight) * g
        case "bounded":
            weight = max(0.0, 1 - knobs["epsilon"] / distance)
            return weight * p + (1 - weight) * g
        case "lenient":
            stands = torch.minimum(g, p / knobs["lenience"])
        case _:
            stands = torch.where(_passes(name, p), g, torch.minimum(g, p))
    left = (p - stands).clamp(min=0)
    return stands + (1 - stands.sum()) * left / left.sum()
