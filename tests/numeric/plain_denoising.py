"""Masked diffusion as its papers' loops have it: one request, float64, numpy, and no line of the engine.

`PlainNetwork` is a Llama whose keys and values are explicit arrays; the samplers above it keep, slice and overwrite
those arrays as Fast-dLLM (prefix, dual) and Fast-dLLM v2 (blocks, sub-blocks) do. Each sampler yields what is committed
after every step: tokens by position. Randomness comes in as functions of (position, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM

State = dict[int, int]
Array = np.ndarray


class PlainNetwork:
    """Two arrays [positions, heads, dim] per layer are its cache: rotated keys, and values."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
        self.config = model.config
        rope: dict[str, Any] = dict(model.config.rope_parameters or {})
        self.theta = float(rope["rope_theta"])
        self.kv_heads = int(model.config.num_key_value_heads or 0)

    def run(self, ids: Sequence[int], at: int, cache: list[list[Array]], seen: Callable[[int], int]) -> Array:
        """Logits of `ids` at positions `at` ..., whose keys and values are put into `cache` (in place, or at its end).

        Position i sees the keys before position seen(i).
        """
        w = self.weights
        states = w["model.embed_tokens.weight"][list(ids)]
        places = np.arange(at, at + len(ids))
        while len(cache) < self.config.num_hidden_layers:
            cache.append([np.zeros((0, self.kv_heads, self._dim))] * 2)
        for layer, kept in enumerate(cache):
            part = f"model.layers.{layer}."
            inner = self._norm(states, w[part + "input_layernorm.weight"])
            query, key, value = (
                (inner @ w[f"{part}self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, self._dim) for name in "qkv"
            )
            for index, fresh in enumerate((self._rotate(key, places), value)):
                kept[index] = np.concatenate((kept[index][:at], fresh, kept[index][at + len(ids) :]))
            mixed = self._attend(self._rotate(query, places), kept[0], kept[1], [seen(int(i)) for i in places])
            states = states + mixed @ w[part + "self_attn.o_proj.weight"].T
            inner = self._norm(states, w[part + "post_attention_layernorm.weight"])
            gate = inner @ w[part + "mlp.gate_proj.weight"].T
            up = inner @ w[part + "mlp.up_proj.weight"].T
            states = states + (gate / (1 + np.exp(-gate)) * up) @ w[part + "mlp.down_proj.weight"].T
        logits: Array = self._norm(states, w["model.norm.weight"]) @ w["lm_head.weight"].T
        return logits

    @property
    def _dim(self) -> int:
        return int(self.config.hidden_size // self.config.num_attention_heads)

    def _norm(self, states: Array, weight: Array) -> Array:
        scaled: Array = states / np.sqrt((states**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * weight
        return scaled

    def _rotate(self, heads: Array, places: Array) -> Array:
        half = self._dim // 2
        angles = places[:, None, None] * self.theta ** (-2 * np.arange(half) / self._dim)
        first, second = heads[..., :half], heads[..., half:]
        return np.concatenate(
            (first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)), -1
        )

    def _attend(self, query: Array, key: Array, value: Array, seen: list[int]) -> Array:
        group = query.shape[1] // key.shape[1]
        scores = np.einsum("qhd,khd->hqk", query, key.repeat(group, 1)) / math.sqrt(self._dim)
        hidden = np.arange(len(key)) >= np.array(seen)[:, None]
        weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, value.repeat(group, 1)).reshape(len(query), -1)


@dataclass
class Choice:
    """A rule and how tokens are drawn. `noise` and `order` are functions of (position, step); None is greedy."""

    rule: str
    mask: int
    value: float = 0.0  # its knob
    steps: int = 0  # of a block; 0: one token a step
    dream: bool = False  # quotas by Dream's times
    tempered: bool = False
    temperature: float = 0.0
    top_k: int = 0
    noise: Callable[[int, int], Array] | None = None
    order: Callable[[int, int], float] | None = None
    banned: Callable[[int], set[int]] = lambda _: set()  # token ids at a position, beside the mask

    def look(self, row: Array, position: int, step: int) -> tuple[int, float]:
        """The token of a position, and what the rule ranks it by."""
        row = row.copy()
        row[[self.mask, *self.banned(position)]] = -np.inf
        drawn = row
        if self.noise is not None:
            drawn = (row - row.max()) / self.temperature
            if self.top_k:
                drawn = np.where(drawn < np.sort(drawn)[-self.top_k], -np.inf, drawn)
        law = _softmax(drawn if self.tempered and self.noise is not None else row)
        token = int(np.argmax(drawn if self.noise is None else drawn + self.noise(position, step)))
        if self.rule == "entropy":
            return token, float(sum(p * math.log(p) for p in law if p > 0))
        if self.rule == "margin":
            best = sorted(law)
            return token, float(best[-1] - best[-2])
        if self.rule == "random":
            assert self.order is not None
            return token, self.order(position, step)
        return token, float(law[token])

    def pick(self, ranked: dict[int, float], step: int, begun: int, left: int) -> list[int]:
        """The positions that are committed."""
        order = sorted(ranked, key=lambda at: (-ranked[at], at))
        c = [ranked[at] for at in order]
        quota = self.quota(step, begun, left)
        if self.rule in ("quota", "random", "entropy", "margin"):
            n = quota
        elif self.rule == "threshold":
            n = sum(x >= self.value for x in c)
        elif self.rule == "dynamic":
            n = max(quota, sum(x > self.value for x in c))
        elif self.rule == "frechet":
            n = max([0] + [k for k in range(1, len(c) + 1) if sum(c[:k]) - (k - 1) - (1 - c[k - 1]) > self.value])
        else:
            n = max([0] + [k for k in range(1, len(c) + 1) if (k + 1) * (1 - c[k - 1]) <= self.value])
            if self.rule == "factor_compat" and max(n, 1) == len(c) - 1:
                n = len(c)
        return order[: max(n, 1)]

    def quota(self, step: int, begun: int, left: int) -> int:
        steps = min(self.steps or begun, begun)
        if not self.dream or not self.steps:
            return begun // steps + (1 if step < begun % steps else 0)
        if step + 1 >= steps:
            return left
        t = np.linspace(1, 1e-3, steps + 1)
        return max(1, int(left * (1 - t[step + 1] / t[step])))


def _softmax(row: Array) -> Array:
    weights: Array = np.exp(row - row.max())
    return weights / weights.sum()


def full_attention(
    net: PlainNetwork,
    prompt: Sequence[int],
    canvas: int,
    block: int,
    choice: Choice,
    cache: str = "none",
    shift: bool = False,
    refresh_always: bool = False,
) -> Iterator[State]:
    """LLaDA's sampler without a cache, or Fast-dLLM's with its prefix or dual cache; Dream's with `shift`.

    `refresh_always` fills the cache anew in every step.
    """
    mask = choice.mask
    x = [*prompt, *[mask] * canvas]
    end = len(x)
    for s in range(len(prompt), end, block):
        e = min(s + block, end)
        kept: list[list[Array]] = []
        step, begun, fresh = 0, e - s, True
        while mask in x[s:e]:
            whole = fresh or cache == "none" or refresh_always
            if whole:
                kept, base = [], 0
                logits = net.run(x, 0, kept, lambda _: end)
            elif cache == "prefix":
                base = s
                past = [[keys[:s], values[:s]] for keys, values in kept]
                logits = net.run(x[s:], s, past, lambda _: end)
            else:
                base = s
                logits = net.run(x[s:e], s, kept, lambda _: end)
            seen = {i: choice.look(logits[i - base - shift], i, step) for i in range(s, e) if x[i] == mask}
            taken = set(choice.pick({i: rank for i, (_, rank) in seen.items()}, step, begun, len(seen)))
            if shift and fresh and cache != "none":
                taken.add(s)
            for i in taken:
                x[i] = seen[i][0]
            step, fresh = step + 1, False
            yield {i: x[i] for i in range(len(prompt), end) if x[i] != mask}


def block_causal(
    net: PlainNetwork,
    prompt: Sequence[int],
    tokens: int,
    block: int,
    choice: Choice,
    sub_block: int = 0,
    cache: str = "block",
    shift: bool = False,
    recompute: bool = False,
) -> Iterator[State]:
    """SDAR's sampler, and Fast-dLLM v2's with sub-blocks and `shift`: a pass over a full block's final tokens stores
    its KV, and is a pass of its own. Ends once `tokens` are there. `recompute` keeps no KV at all.
    """
    x, mask = list(prompt), choice.mask

    def seen(i: int) -> int:
        return (i // block + 1) * block

    def run(ids: Sequence[int], at: int, past: list[list[Array]]) -> Array:
        if recompute:
            return net.run([*x[:at], *ids], 0, [], lambda i: min(seen(i), at + len(ids)))[at:]
        copy = [list(pair) for pair in past]
        return net.run(ids, at, copy, lambda i: min(seen(i), at + len(ids)))

    def now() -> State:
        return {i: t for i, t in enumerate(x) if i >= len(prompt) and t != mask}

    start = len(prompt) // block * block
    kv: list[list[Array]] = []
    last = None
    if start:
        last = net.run(x[:start], 0, kv, seen)[-1]
    while len(now()) < tokens or mask in x[: len(prompt) + tokens]:
        if shift and len(x) == start:
            assert last is not None
            x.append(choice.look(last, start, 0)[0])
            yield now()
        x += [mask] * (start + block - len(x))
        step, begun = 0, x.count(mask)
        inner: list[list[Array]] | None = None  # the sub-block cache: KV up to the block's end
        for first in range(start, start + block, sub_block or block):
            stop = first + (sub_block or block)
            while mask in x[first:stop]:
                if cache == "dual" and inner is not None and x[first] != mask:
                    base, logits = first, net.run(x[first:stop], first, inner, seen)
                elif cache == "dual":
                    inner = [list(pair) for pair in kv]
                    base, logits = start, net.run(x[start:], start, inner, seen)
                else:
                    base, logits = start, run(x[start:], start, kv)
                found = {i: choice.look(logits[i - base - shift], i, step) for i in range(first, stop) if x[i] == mask}
                for i in choice.pick({i: rank for i, (_, rank) in found.items()}, step, begun, x.count(mask)):
                    x[i] = found[i][0]
                step += 1
                yield now()
        last = net.run(x[start:], start, kv, seen)[-1]
        start += block
