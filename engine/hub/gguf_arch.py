"""The architectures whose GGUF files can be converted: configuration, tensor names and transforms of each.

A new one is a name table, a configuration function and a line in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.errors import ModelLoadError
from engine.hub import gguf_config
from engine.hub.gguf_reader import GGUFFile
from engine.hub.gguf_tensors import TensorSource, Transform, rotary_unpermute

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3 = _LLAMA | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3 = _QWEN3 | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# Read by the configuration (rotary factors) or recomputed by every engine (rotary tables).
_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

Transforms = Callable[[GGUFFile, str, str], Transform]  # file, stem ("attn_q"), kind ("weight" or "bias")


def _plain(gguf: GGUFFile, stem: str, kind: str) -> Transform:
    del gguf, stem, kind
    return Transform()


def _llama(gguf: GGUFFile, stem: str, kind: str) -> Transform:
    del kind
    heads = gguf.integer(f"{gguf.architecture}.attention.head_count")
    if stem == "attn_q":
        return rotary_unpermute(heads)
    if stem == "attn_k":
        return rotary_unpermute(gguf.integer(f"{gguf.architecture}.attention.head_count_kv", heads))
    return Transform()


def _gemma3(gguf: GGUFFile, stem: str, kind: str) -> Transform:
    """Gemma multiplies by 1 + weight; llama.cpp stores that sum."""
    del gguf, kind
    return Transform(add=-1.0) if stem.endswith("norm") else Transform()


def _gpt2(gguf: GGUFFile, stem: str, kind: str) -> Transform:
    """GPT-2's layers are Conv1D, [inputs, outputs]; llama.cpp stores the transpose, as for linears."""
    del gguf
    return Transform(transpose=kind == "weight" and stem in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"))


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps to a Hugging Face model."""

    config: Callable[[GGUFFile, TensorSource], dict[str, object]]
    block: Mapping[str, str]
    transforms: Transforms = _plain
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    layers: str = "model.layers"


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(gguf_config.llama_config, _LLAMA, _llama),
    "qwen2": Architecture(gguf_config.qwen2_config, _LLAMA),
    "qwen3": Architecture(gguf_config.qwen3_config, _QWEN3),
    "gemma3": Architecture(gguf_config.gemma3_config, _GEMMA3, _gemma3),
    "phi3": Architecture(gguf_config.phi3_config, _PHI3),
    "gpt2": Architecture(gguf_config.gpt2_config, _GPT2, _gpt2, _GPT2_TOP, "transformer.h"),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stored tensor goes: its name in the checkpoint and the transform that gets it there."""

    target: str
    transform: Transform


def find_architecture(gguf: GGUFFile) -> Architecture:
    """Raises ModelLoadError that names the supported architectures."""
    name = gguf.architecture
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelLoadError(f"{gguf.path.name}: GGUF files of architecture {name!r} are not supported; known: {known}")
    return ARCHITECTURES[name]


def place_tensors(gguf: GGUFFile, arch: Architecture) -> dict[str, Placement]:
    """Stored name -> placement, in file order. Raises ModelLoadError for unknown or missing tensors."""
    placements: dict[str, Placement] = {}
    seen: dict[str, set[str]] = {}
    for name in gguf.tensors:
        if name in _NOT_WEIGHTS or name.endswith((".attn_rot_embd", ".rope_freqs.weight")):
            continue
        head, _, kind = name.rpartition(".")
        layer, stem = "", head
        if head.startswith("blk."):
            _, layer, stem = head.split(".", 2) if head.count(".") >= 2 else ("", "", "")
        table = arch.block if layer else arch.top
        if kind not in ("weight", "bias") or stem not in table or (layer and not layer.isdecimal()):
            raise ModelLoadError(f"{gguf.path.name}: the tensor {name!r} is not known for {gguf.architecture}")
        prefix = f"{arch.layers}.{int(layer)}." if layer else ""
        placements[name] = Placement(f"{prefix}{table[stem]}.{kind}", arch.transforms(gguf, stem, kind))
        seen.setdefault(layer, set()).add(f"{stem}.{kind}")
    _check_complete(gguf, arch, seen)
    return placements


def _check_complete(gguf: GGUFFile, arch: Architecture, seen: Mapping[str, set[str]]) -> None:
    layers = gguf.integer(f"{gguf.architecture}.block_count")
    top = {f"{stem}.weight" for stem in arch.top if stem != "output"}
    missing = sorted(top - seen.get("", set()))
    wanted = {f"{stem}.weight" for stem in arch.block} | seen.get("0", set())
    for layer in range(min(layers, len(seen) + 1)):
        missing += sorted(f"blk.{layer}.{name}" for name in wanted - seen.get(str(layer), set()))
    if missing or len(seen) != layers + 1:
        what = f"the tensor {missing[0]} is missing" if missing else f"it does not hold {layers} layers"
        raise ModelLoadError(f"{gguf.path.name}: {what}: the file is incomplete")
