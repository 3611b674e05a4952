"""A slow sampler in plain Python floats, written from the docstring of SamplingParams alone, and builders for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.runtime.sampler import SamplingState
from engine.types import Request, SamplingParams


def state(
    prompt: Sequence[int] = (1, 2, 3),
    outputs: Sequence[int] = (),
    *,
    eos_ids: tuple[int, ...] = (),
    choice: int = 0,
    **sampling,
) -> SamplingState:
    params = SamplingParams(max_tokens=100, **sampling)
    return SamplingState(Request("r", tuple(prompt), params, eos_ids=eos_ids, choice=choice), outputs)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def processed(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], outputs: Sequence[int], eos: Sequence[int]
) -> list[float]:
    """Logits after masks, bias and penalties."""
    text = [*prompt, *outputs]
    out = []
    for token, value in enumerate(logits):
        banned = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        if len(outputs) < params.min_tokens:
            banned = banned or token in eos or token in params.stop_token_ids
        for word in params.bad_words:
            start = len(text) - len(word) + 1
            banned = banned or (word[-1] == token and start >= 0 and tuple(text[start:]) == word[:-1])
        if banned:
            out.append(-math.inf)
            continue
        value += sum(bias for biased, bias in params.logit_bias if biased == token)
        if token in text:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if token in outputs:
            value -= params.presence_penalty + params.frequency_penalty * list(outputs).count(token)
        out.append(value)
    return out


def law(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature, min_p, top_k and top_p of processed logits; temperature must not be 0."""
    largest = max(logits)
    weights = [math.exp((value - largest) / params.temperature) for value in logits]
    order = sorted((token for token, weight in enumerate(weights) if weight > 0), key=lambda t: (-logits[t], t))
    order = [token for token in order if weights[token] >= params.min_p * weights[order[0]]]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, running, nucleus = math.fsum(weights[token] for token in order), 0.0, []
        for token in order:
            nucleus.append(token)
            running += weights[token]
            if running >= params.top_p * total:
                break
        order = nucleus
    total = math.fsum(weights[token] for token in order)
    laws = [0.0] * len(logits)
    for token in order:
        laws[token] = weights[token] / total
    return laws


def chi_square_limit(degrees: int, z: float = 4.75) -> float:
    """The quantile that a chi-square exceeds with probability about 1e-6 (Wilson and Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: Sequence[int], law: Sequence[float]) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells that expect under 5 are pooled. Impossible cells must be empty."""
    total = sum(counts)
    cells, pool = [], [0.0, 0.0]
    for seen, probability in zip(counts, law, strict=True):
        assert probability > 0 or seen == 0
        if probability * total >= 5:
            cells.append([seen, probability * total])
        else:
            pool = [pool[0] + seen, pool[1] + probability * total]
    if pool[1] > 0:
        cells.append(pool)
    return sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1
