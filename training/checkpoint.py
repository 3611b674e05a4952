"""Write a draft in z-lab's layout, which every server of DFlash drafts reads; d2t and a head of its own are ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.models.dflash.spec import DFlashSpec
from engine.models.dflash.weights import tensor_shapes


def zlab_config(spec: DFlashSpec, num_target_layers: int, dtype: torch.dtype) -> dict[str, object]:
    """config.json of the layout, as a dictionary: a Qwen3 configuration with block_size and dflash_config."""
    windows = [layer.window for layer in spec.layers]
    window = next((size for size in windows if size is not None), None)
    slides = ["full_attention" if size is None else "sliding_attention" for size in windows]
    rope = dict(spec.rope)
    theta = rope.pop("rope_theta")
    config: dict[str, object] = {
        "architectures": ["DFlash2DraftModel" if spec.selector_rank or spec.conv_kernel else "DFlashDraftModel"],
        "attention_bias": spec.attention_bias,
        "attention_dropout": 0.0,
        "block_size": spec.block_size,
        "dflash_config": _own(spec),
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": spec.head_dim,
        "hidden_act": spec.hidden_act,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "layer_types": slides,
        "max_position_embeddings": spec.max_position_embeddings,
        "max_window_layers": len(windows),
        "model_type": "qwen3",
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": len(windows),
        "num_key_value_heads": spec.num_kv_heads,
        "num_target_layers": num_target_layers,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_theta": theta,
        "sliding_window": window,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": window is not None,
        "vocab_size": spec.vocab_size,
    }
    causal = {layer.causal for layer in spec.layers}
    if any(layer.causal != (layer.window is not None) for layer in spec.layers):
        assert len(causal) == 1, "one key says it for all layers"
        config["is_causal"] = causal.pop()
    if spec.draft_vocab_size != spec.vocab_size:
        config["draft_vocab_size"] = spec.draft_vocab_size
    return config


def _own(spec: DFlashSpec) -> dict[str, object]:
    """dflash_config: what every draft says, then what differs from a plain one."""
    own: dict[str, object] = {"mask_token_id": spec.mask_token_id, "target_layer_ids": list(spec.taps)}
    extras: dict[str, tuple[object, object]] = {
        "sample_from_anchor": (spec.anchor_predicts, False),
        "input_embedding_scale": (spec.embedding_scale, 1.0),
        "output_multiplier": (spec.logit_scale, 1.0),
        "final_logit_softcapping": (spec.logit_softcap, None),
        "markov_rank": (spec.markov_rank, 0),
        "markov_head_type": ("vanilla" if spec.markov_rank else None, None),
        "enable_confidence_head": (spec.confidence_head, False),
        "confidence_head_with_markov": (spec.confidence_with_markov, False),
    }
    own |= {key: value for key, (value, plain) in extras.items() if value != plain}
    if spec.selector_rank or spec.conv_kernel:
        own |= {"conv_kernel_size": spec.conv_kernel, "conv_group_size": spec.conv_group}
        own |= {"selector_rank": spec.selector_rank, "selector_top_k": spec.selector_top_k}
    return own


def save_zlab(folder: Path, spec: DFlashSpec, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, object]) -> None:
    """config.json and model.safetensors of a draft; `extra` must hold num_target_layers, and may hold any other key.

    `tensors` are those of `tensor_shapes(spec)`, in one float dtype, with `d2t` as ABSOLUTE ids (offsets are written).
    Raises ValueError for tensors that are missing, surplus or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != tensor_shapes(spec):
        wrong = sorted(set(shapes.items()) ^ set(tensor_shapes(spec).items()))
        raise ValueError(f"these tensors do not fit the spec: {wrong[:4]}")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if "d2t" in stored:
        stored["d2t"] = stored["d2t"].long() - torch.arange(len(stored["d2t"]))
    layers = extra["num_target_layers"]
    assert isinstance(layers, int)
    config = zlab_config(spec, layers, stored["fc.weight"].dtype) | dict(extra)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
