"""Tiny GGUF files of every supported architecture, written with gguf's own writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[np.float32]]

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
# The byte alphabet first, then merges of "hello" and of digits, then special tokens.
_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = [chr(b) for b in _BYTES] + [chr(0x100 + i) for i in range(256 - len(_BYTES))]
MERGED = ["he", "ll", "hell", "hello", "\u0120hello", "12", "34", "1234"]
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 hello", "1 2", "3 4", "12 34"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
TOKENS = [*ALPHABET, *MERGED, *SPECIAL]
TYPES = [1] * (len(ALPHABET) + len(MERGED)) + [CONTROL] * 3 + [USER_DEFINED]
BOS, EOS, PAD = TOKENS.index("<|im_start|>"), TOKENS.index("<|im_end|>"), TOKENS.index("<|endoftext|>")


def random_tensors(architecture: str) -> Tensors:
    """Random weights under llama.cpp's names, shapes as in llama.cpp's files."""
    random = np.random.default_rng(0)
    inner = KV_HEADS * HIDDEN // HEADS
    block: dict[str, tuple[int, ...]] = {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,)}
    block |= {"attn_output.weight": (HIDDEN, HIDDEN), "ffn_down.weight": (HIDDEN, FEED_FORWARD)}
    top: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if architecture == "gpt2":
        block |= {"attn_qkv.weight": (3 * HIDDEN, HIDDEN), "ffn_up.weight": (FEED_FORWARD, HIDDEN)}
        block |= {name.replace("weight", "bias"): shape[:1] for name, shape in block.items()}
        top |= {"position_embd.weight": (64, HIDDEN), "output_norm.bias": (HIDDEN,)}
    elif architecture == "phi3":
        block |= {"attn_qkv.weight": (HIDDEN + 2 * inner, HIDDEN), "ffn_up.weight": (2 * FEED_FORWARD, HIDDEN)}
    else:
        block |= {"attn_q.weight": (HIDDEN, HIDDEN), "attn_k.weight": (inner, HIDDEN)}
        block |= {"attn_v.weight": (inner, HIDDEN), "ffn_gate.weight": (FEED_FORWARD, HIDDEN)}
        block |= {"ffn_up.weight": (FEED_FORWARD, HIDDEN)}
    if architecture == "qwen2":
        block |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (inner,), "attn_v.bias": (inner,)}
    if architecture in ("qwen3", "gemma3"):
        block |= {"attn_q_norm.weight": (HIDDEN // HEADS,), "attn_k_norm.weight": (HIDDEN // HEADS,)}
    if architecture == "gemma3":
        block |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
    shapes = top | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def metadata(architecture: str) -> dict[str, object]:
    """The keys a converter of llama.cpp writes, by full name."""
    keys: dict[str, object] = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
    }
    if architecture == "gpt2":
        keys["attention.layer_norm_epsilon"] = 1e-5
    else:
        keys |= {"attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5}
        keys |= {"rope.freq_base": 10000.0, "attention.key_length": HIDDEN // HEADS}
    if architecture == "gemma3":
        keys["attention.sliding_window"] = 8
    if architecture == "phi3":
        keys["rope.scaling.original_context_length"] = 32
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def tokenizer_metadata() -> dict[str, object]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: Tensors | None = None,
    keys: Mapping[str, object] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Write a model. `keys` are added to (None: removed from) the usual metadata; `kinds` quantize single tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    values = metadata(architecture) | tokenizer_metadata() | dict(keys or {})
    for key, value in values.items():
        _add(writer, key, value)
    for name, data in (random_tensors(architecture) if tensors is None else tensors).items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)
