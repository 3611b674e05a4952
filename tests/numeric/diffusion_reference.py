"""Masked-diffusion networks as plain loops in float64, straight from published tensor names: no engine, no cache.

One decoder covers the families: RMSNorm, rotate-half RoPE over whole heads, grouped queries, optional biases of q, k
and v, optional norms of query and key heads, SwiGLU. Shifted families are not shifted here: row i holds what the
network says at position i.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


@dataclass(frozen=True, eq=False)
class Layer:
    """Float64 weights [out, in], biases and norms of one layer."""

    norms: tuple[np.ndarray, np.ndarray]  # before attention, before the MLP
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    biases: tuple[np.ndarray | float, np.ndarray | float, np.ndarray | float]
    head_norms: tuple[np.ndarray, np.ndarray] | None
    out: np.ndarray
    mlps: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]  # gate, up, down; of each expert where there are any
    router: np.ndarray | None = None  # [experts, width]


@dataclass(frozen=True, eq=False)
class Network:
    heads: int
    kv_heads: int
    theta: float
    epsilon: float
    embedding: np.ndarray
    layers: tuple[Layer, ...]
    norm: np.ndarray
    head: np.ndarray
    chosen: int = 0  # experts of a token
    rescaled: bool = False  # do their weights add up to 1


def reference_logits(folder: Path, ids: Sequence[int], mode: str, block_length: int = 1) -> np.ndarray:
    """Logits [T, V] float64; see `reference_states`."""
    logits: np.ndarray = reference_states(folder, ids, mode, block_length) @ _network(folder).head.T
    return logits


def reference_states(folder: Path, ids: Sequence[int], mode: str, block_length: int = 1) -> np.ndarray:
    """What the head reads, [T, width] float64, of one pass over `ids` at positions 0 to T - 1.

    `mode`: "full" (every position sees all), "block_causal" (blocks of `block_length` from 0) or "causal".
    """
    network = _network(folder)
    states = network.embedding[list(ids)]
    length = len(states)
    if mode == "full":
        seen = [length] * length
    elif mode == "block_causal":
        seen = [min((i // block_length + 1) * block_length, length) for i in range(length)]
    else:
        assert mode == "causal", mode
        seen = [i + 1 for i in range(length)]
    for layer in network.layers:
        states = states + _attention(network, layer, _rms(states, layer.norms[0], network.epsilon), seen)
        inner = _rms(states, layer.norms[1], network.epsilon)
        states = states + (_mlp(inner, *layer.mlps[0]) if layer.router is None else _experts(network, layer, inner))
    return _rms(states, network.norm, network.epsilon)


def _network(folder: Path) -> Network:
    return _read(folder, (folder / "model.safetensors").stat().st_mtime_ns)


def _mlp(states: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    opened = states @ gate.T
    out: np.ndarray = (opened / (1 + np.exp(-opened)) * (states @ up.T)) @ down.T
    return out


def _experts(network: Network, layer: Layer, states: np.ndarray) -> np.ndarray:
    """A softmax over all experts; each token goes to its best ones, weighed with what it gives them."""
    assert layer.router is not None
    mixed = np.zeros_like(states)
    for i, state in enumerate(states):
        scores = np.exp(layer.router @ state)
        weights = scores / scores.sum()
        best = np.argsort(-weights)[: network.chosen]
        for expert in best:
            share = weights[expert] / (weights[best].sum() if network.rescaled else 1.0)
            mixed[i] += share * _mlp(state, *layer.mlps[expert])
    return mixed


def _attention(network: Network, layer: Layer, states: np.ndarray, seen: list[int]) -> np.ndarray:
    """`seen[i]` is how many of the keys, from the first on, position i sees."""
    heads, kv_heads = network.heads, network.kv_heads
    projected = [states @ weight.T + bias for weight, bias in zip(layer.qkv, layer.biases, strict=True)]
    counts = (heads, kv_heads, kv_heads)
    query, key, value = (part.reshape(len(part), n, -1) for part, n in zip(projected, counts, strict=True))
    if layer.head_norms is not None:
        query = _rms(query, layer.head_norms[0], network.epsilon)
        key = _rms(key, layer.head_norms[1], network.epsilon)
    query, key = _rotated(query, network.theta), _rotated(key, network.theta)
    joined = np.zeros((len(states), heads, value.shape[2]))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        for i in range(len(states)):
            scores = key[: seen[i], shared] @ query[i, head] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            joined[i, head] = weights @ value[: seen[i], shared] / weights.sum()
    out: np.ndarray = joined.reshape(len(states), -1) @ layer.out.T
    return out


def _rms(states: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    scaled: np.ndarray = states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) * weight
    return scaled


def _rotated(heads: np.ndarray, theta: float) -> np.ndarray:
    """[T, n, dim]: the pair (j, j + dim / 2) of the token at position p turns by p * theta^(-2 j / dim)."""
    turned = heads.copy()
    half = heads.shape[2] // 2
    for position in range(len(heads)):
        for j in range(half):
            angle = position * theta ** (-2 * j / heads.shape[2])
            first, second = heads[position, :, j], heads[position, :, j + half]
            turned[position, :, j] = first * np.cos(angle) - second * np.sin(angle)
            turned[position, :, j + half] = second * np.cos(angle) + first * np.sin(angle)
    return turned


@lru_cache(maxsize=16)
def _read(folder: Path, written: int) -> Network:
    """`written` (when the weights were) makes a changed file another one."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    return _llada(raw, tensors) if "n_layers" in raw else _llama(raw, tensors)


def _llada(raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> Network:
    """LLaDA's own names, with or without `model.` before them."""
    at = {name.removeprefix("model.").removeprefix("transformer."): array for name, array in tensors.items()}
    layers = []
    for index in range(raw["n_layers"]):
        block = f"blocks.{index}."
        layers.append(
            Layer(
                norms=(at[block + "attn_norm.weight"], at[block + "ff_norm.weight"]),
                qkv=(at[block + "q_proj.weight"], at[block + "k_proj.weight"], at[block + "v_proj.weight"]),
                biases=(0.0, 0.0, 0.0),
                head_norms=None,
                out=at[block + "attn_out.weight"],
                mlps=((at[block + "ff_proj.weight"], at[block + "up_proj.weight"], at[block + "ff_out.weight"]),),
            )
        )
    head = at["wte.weight"] if raw["weight_tying"] else at["ff_out.weight"]
    sizes = raw["n_heads"], raw["n_kv_heads"], raw["rope_theta"], raw["rms_norm_eps"]
    return Network(*sizes, at["wte.weight"], tuple(layers), at["ln_f.weight"], head)


def _llama(raw: dict[str, Any], at: dict[str, np.ndarray]) -> Network:
    """The names of Llama, Qwen2 and Qwen3."""
    layers = []
    for index in range(raw["num_hidden_layers"]):
        block = f"model.layers.{index}."
        attention = block + "self_attn."
        normed, router = attention + "q_norm.weight" in at, at.get(block + "mlp.gate.weight")
        experts = [""] if router is None else [f"experts.{expert}." for expert in range(len(router))]
        mlps = [f"{block}mlp.{expert}" for expert in experts]
        layers.append(
            Layer(
                norms=(at[block + "input_layernorm.weight"], at[block + "post_attention_layernorm.weight"]),
                qkv=tuple(at[f"{attention}{part}_proj.weight"] for part in "qkv"),  # type: ignore[arg-type]
                biases=tuple(at.get(f"{attention}{part}_proj.bias", 0.0) for part in "qkv"),  # type: ignore[arg-type]
                head_norms=(at[attention + "q_norm.weight"], at[attention + "k_norm.weight"]) if normed else None,
                out=at[attention + "o_proj.weight"],
                mlps=tuple(
                    (at[mlp + "gate_proj.weight"], at[mlp + "up_proj.weight"], at[mlp + "down_proj.weight"])
                    for mlp in mlps
                ),
                router=router,
            )
        )
    embedding = at["model.embed_tokens.weight"]
    head = embedding if raw["tie_word_embeddings"] else at["lm_head.weight"]
    sizes = raw["num_attention_heads"], raw["num_key_value_heads"], raw["rope_theta"], raw["rms_norm_eps"]
    routing = raw.get("num_experts_per_tok", 0), bool(raw.get("norm_topk_prob"))
    return Network(*sizes, embedding, tuple(layers), at["model.norm.weight"], head, *routing)
