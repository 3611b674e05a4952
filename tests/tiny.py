"""Tiny random models in real checkpoint folders, one per family: config, safetensors, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB = 259  # 256 bytes, then <bos>, <eos>, <pad>
BOS, EOS, PAD = 256, 257, 258

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def tiny_config(family: str) -> PretrainedConfig:
    """A four-layer configuration that uses what is particular to its family: windows, tied heads, own head sizes."""
    match family:
        case "llama":
            return LlamaConfig(**_COMMON, head_dim=16, tie_word_embeddings=True)
        case "mistral":
            return MistralConfig(**_COMMON, head_dim=24, sliding_window=6)
        case "qwen2":
            return Qwen2Config(**_COMMON, use_sliding_window=True, sliding_window=6, max_window_layers=2)
        case "qwen3":
            return Qwen3Config(**_COMMON, head_dim=32)
        case "gemma3":
            layers = ["sliding_attention", "full_attention"] * 2
            return Gemma3TextConfig(
                **_COMMON, head_dim=16, sliding_window=6, query_pre_attn_scalar=32, layer_types=layers
            )
        case "phi3":
            return Phi3Config(**_COMMON, sliding_window=6)
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCAB,
                n_embd=64,
                n_layer=4,
                n_head=4,
                n_positions=512,
                bos_token_id=BOS,
                eos_token_id=EOS,
            )
    raise ValueError(family)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Random weights, wide enough that logits differ by far more than rounding."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.12)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.05)
    model.eval()
    return model


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint folder that any part of Slipstream can load."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(family, seed).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return tokenizer
