"""config.json of a GGUF file: one function per architecture, from llama.cpp's metadata keys to Hugging Face's.

Sources: the metadata keys of ggml's GGUF specification and the configuration classes of transformers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError
from engine.hub.gguf_reader import GGUFFile, shortest
from engine.hub.gguf_tensors import TensorSource

Json = dict[str, object]

GEMMA3_27B_LAYERS = 62  # the one size whose query scale is hidden_size / heads instead of head_dim


def llama_config(gguf: GGUFFile, source: TensorSource) -> Json:
    """Llama, and Mistral, which llama.cpp stores under the same name; only a sliding window tells them apart."""
    config = _base(gguf, "llama", "LlamaForCausalLM") | _rope(gguf, source)
    if f"{gguf.architecture}.attention.sliding_window" in gguf.metadata:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return config | {"sliding_window": gguf.integer(f"{gguf.architecture}.attention.sliding_window")}
    return config | {
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
    }


def qwen2_config(gguf: GGUFFile, source: TensorSource) -> Json:
    return _base(gguf, "qwen2", "Qwen2ForCausalLM") | _rope(gguf, source) | {"use_sliding_window": False}


def qwen3_config(gguf: GGUFFile, source: TensorSource) -> Json:
    config = _base(gguf, "qwen3", "Qwen3ForCausalLM") | _rope(gguf, source)
    return config | {"attention_bias": "blk.0.attn_q.bias" in gguf.tensors, "use_sliding_window": False}


def gemma3_config(gguf: GGUFFile, source: TensorSource) -> Json:
    """The text part of Gemma 3: layers with a sliding window, every sixth with full attention."""
    config = _base(gguf, "gemma3_text", "Gemma3ForCausalLM")
    layers, head_dim = gguf.integer("gemma3.block_count"), gguf.integer("gemma3.attention.key_length")
    heads, hidden = gguf.integer("gemma3.attention.head_count"), gguf.integer("gemma3.embedding_length")
    period = gguf.integer("gemma3.attention.sliding_window_pattern", 6)
    kinds = ["full_attention" if period and not (i + 1) % period else "sliding_attention" for i in range(layers)]
    softcap = "gemma3.final_logit_softcapping"
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "query_pre_attn_scalar": hidden // heads if layers == GEMMA3_27B_LAYERS else head_dim,
        "sliding_window": gguf.integer("gemma3.attention.sliding_window"),
        "rope_parameters": {
            "full_attention": {"rope_theta": gguf.number("gemma3.rope.freq_base", 1e6)} | _scaling(gguf, source),
            "sliding_attention": {
                "rope_theta": gguf.number("gemma3.rope.freq_base_swa", 1e4),
                "rope_type": "default",
            },
        },
        "final_logit_softcapping": gguf.number(softcap) if softcap in gguf.metadata else None,
        "attn_logit_softcapping": None,
    }


def phi3_config(gguf: GGUFFile, source: TensorSource) -> Json:
    config = _base(gguf, "phi3", "Phi3ForCausalLM") | _rope(gguf, source, partial=True)
    original = gguf.integer("phi3.rope.scaling.original_context_length", gguf.integer("phi3.context_length"))
    window = gguf.integer("phi3.attention.sliding_window", 0)
    return config | {"original_max_position_embeddings": original, "sliding_window": window or None}


def gpt2_config(gguf: GGUFFile, source: TensorSource) -> Json:
    del source
    return _common(gguf, "gpt2", "GPT2LMHeadModel") | {
        "n_positions": gguf.integer("gpt2.context_length"),
        "n_embd": gguf.integer("gpt2.embedding_length"),
        "n_layer": gguf.integer("gpt2.block_count"),
        "n_head": gguf.integer("gpt2.attention.head_count"),
        "n_inner": gguf.integer("gpt2.feed_forward_length"),
        "layer_norm_epsilon": gguf.number("gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _common(gguf: GGUFFile, model_type: str, architecture: str) -> Json:
    """Keys of every model. llama.cpp writes an output projection only where it is not the embedding matrix."""
    if "token_embd.weight" not in gguf.tensors:
        raise ModelLoadError(f"{gguf.path.name}: the tensor token_embd.weight is missing")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }


def _base(gguf: GGUFFile, model_type: str, architecture: str) -> Json:
    """The keys that all decoders of the Llama kind share."""
    arch = gguf.architecture
    if gguf.integer(f"{arch}.expert_count", 0):
        raise ModelLoadError(f"{gguf.path.name}: mixture-of-experts GGUF files are not supported")
    hidden, heads = gguf.integer(f"{arch}.embedding_length"), gguf.integer(f"{arch}.attention.head_count")
    kv_heads = gguf.integer(f"{arch}.attention.head_count_kv", heads)
    head_dim = gguf.integer(f"{arch}.attention.key_length", hidden // heads if heads > 0 else 0)
    if min(hidden, heads, kv_heads, head_dim) < 1:
        raise ModelLoadError(
            f"{gguf.path.name}: width {hidden}, {heads} heads, {kv_heads} key heads of {head_dim} make no model"
        )
    if gguf.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise ModelLoadError(f"{gguf.path.name}: keys and values of different length are not supported")
    return _common(gguf, model_type, architecture) | {
        "hidden_size": hidden,
        "intermediate_size": gguf.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": gguf.integer(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": gguf.integer(f"{arch}.context_length"),
        "rms_norm_eps": gguf.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
    }


def _rope(gguf: GGUFFile, source: TensorSource, *, partial: bool = False) -> Json:
    arch = gguf.architecture
    heads, hidden = gguf.integer(f"{arch}.attention.head_count"), gguf.integer(f"{arch}.embedding_length")
    head_dim = gguf.integer(f"{arch}.attention.key_length", hidden // heads)
    rotary = gguf.integer(f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim and not partial:
        raise ModelLoadError(f"{gguf.path.name}: rotary embeddings on a part of a head are not supported for {arch}")
    config: Json = {"rope_theta": gguf.number(f"{arch}.rope.freq_base", 1e4)}
    scaling = _scaling(gguf, source)
    if scaling["rope_type"] != "default":
        config["rope_scaling"] = scaling
    return config if rotary == head_dim else config | {"partial_rotary_factor": rotary / head_dim}


def _scaling(gguf: GGUFFile, source: TensorSource) -> Json:
    """The `rope_scaling` of a file: a named kind in its metadata, or factors per dimension in tensors."""
    arch = gguf.architecture
    original = gguf.integer(f"{arch}.rope.scaling.original_context_length", 0)
    if "rope_factors_long.weight" in gguf.tensors:
        kinds = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
        return {"rope_type": "longrope"} | {key: _vector(gguf, source, name) for key, name in kinds.items()}
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, np.array(_vector(gguf, source, "rope_freqs.weight")))
    old = f"{arch}.rope.scale_linear"
    kind = gguf.string(f"{arch}.rope.scaling.type", "linear" if old in gguf.metadata else "none")
    factor = gguf.number(f"{arch}.rope.scaling.factor", gguf.number(old, 1.0))
    if kind in ("none", "") or factor == 1.0:
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        betas = {f"beta_{name}": f"{arch}.rope.scaling.yarn_beta_{name}" for name in ("fast", "slow")}
        given = {name: gguf.number(key) for name, key in betas.items() if key in gguf.metadata}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | given
    raise ModelLoadError(f"{gguf.path.name}: the rotary scaling {kind!r} is not supported")


def _vector(gguf: GGUFFile, source: TensorSource, name: str) -> list[float]:
    if name not in gguf.tensors:
        raise ModelLoadError(f"{gguf.path.name}: the tensor {name} is missing")
    return [shortest(value) for value in source.whole(gguf.tensors[name]).reshape(-1).tolist()]


def _llama3_scaling(gguf: GGUFFile, factors: npt.NDArray[np.float64]) -> Json:
    """The Llama 3.1 parameters that gave these per-dimension divisors; refuses factors that they do not explain.

    A wavelength above original/low is divided by `factor`, one below original/high is kept, those between are
    blended. low = 1, high = 4 and original = 8192 are the only published values; `factor` is the largest divisor.
    """
    arch = gguf.architecture
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    theta = gguf.number(f"{arch}.rope.freq_base", 1e4)
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ModelLoadError(f"{gguf.path.name}: the rotary frequency factors are none of a known kind")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
