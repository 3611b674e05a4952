"""A trained network as a Hugging Face folder in the layout of `dllm`'s Llama conversions, and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.errors import ConfigError
from training.diffusion import vocabulary
from training.diffusion.network import Network, Shape

_OWN = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


def save(
    folder: Path, network: Network, tokenizer: Tokenizer, attention: str, block: int, dtype: torch.dtype = torch.float16
) -> None:
    """config.json, model.safetensors, generation_config.json and the tokenizer.

    Beside Llama's keys the configuration says `mask_token_id`, `diffusion_attention` ("full" or "block_causal"),
    `block_size` (block_causal: as trained; full: what it is best decoded by) and that no logits are shifted.
    """
    shape = network.shape
    end, turn_end, mask = (
        vocabulary.token(tokenizer, text) for text in (vocabulary.END, vocabulary.TURN_END, vocabulary.MASK)
    )
    sizes = (shape.vocab, shape.hidden, shape.inner, shape.layers, shape.heads, shape.head_dim)
    config = {
        "architectures": ["A2DLlamaLMHeadModel"],
        "model_type": "a2d-llama",
        **dict(zip(_OWN, sizes, strict=True)),
        "num_key_value_heads": shape.heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": turn_end,
        "pad_token_id": end,
        "mask_token_id": mask,
        "diffusion_attention": attention,
        "block_size": block,
        "shift_logits": False,
    }
    vocabulary.save(folder, tokenizer, shape.max_positions)
    tensors = {f"model.{name}": value.detach().to(dtype).contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stops = {"eos_token_id": [turn_end, end], "pad_token_id": end}
    for name, values in (("config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Network, Tokenizer]:
    """The network in float32 and its tokenizer. Raises ConfigError for a folder that `save` did not write."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocab, hidden, inner, layers, heads, head_dim = (int(config[key]) for key in _OWN)
        rest = float(config["rope_theta"]), float(config["rms_norm_eps"]), int(config["max_position_embeddings"])
        network = Network(Shape(vocab, hidden, inner, layers, heads, head_dim, *rest))
        network.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{folder} is no checkpoint of train-diffusion: {error}") from error
    return network, tokenizer
