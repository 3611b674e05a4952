"""EAGLE-3 drafts of random weights in both published layouts, and what they should draft, by plain loops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

WIDTH, MIDDLE, HEADS, KV_HEADS, DIM, THETA, EPS = 64, 80, 4, 2, 16, 10000.0, 1e-5


@dataclass(frozen=True)
class Variant:
    """What a checkpoint may do one way or another. `layer_ids` as files have them: the streams entering layers."""

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    draft_vocab: int | None = 100
    own_embedding: bool = False
    bias: bool = False
    window: int | None = None
    layer_ids: tuple[int, ...] = (1, 2, 4)


def draft_tensors(config: PretrainedConfig, variant: Variant, seed: int = 0) -> dict[str, torch.Tensor]:
    """Under the names of the original layout, with d2t and t2d as files hold them."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    def norm(width: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    target, taps = config.hidden_size, len(variant.layer_ids)
    tensors = {"fc.weight": matrix(WIDTH, taps * target), "norm.weight": norm(WIDTH)}
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = norm(WIDTH)
    shapes = {"q": (HEADS * DIM, 2 * WIDTH), "k": (KV_HEADS * DIM, 2 * WIDTH), "v": (KV_HEADS * DIM, 2 * WIDTH)}
    shapes = {f"self_attn.{name}": shape for name, shape in (shapes | {"o": (WIDTH, HEADS * DIM)}).items()}
    shapes |= {"mlp.gate": (MIDDLE, WIDTH), "mlp.up": (MIDDLE, WIDTH), "mlp.down": (WIDTH, MIDDLE)}
    for name, shape in shapes.items():
        tensors[f"midlayer.{name}_proj.weight"] = matrix(*shape)
        if variant.bias:
            tensors[f"midlayer.{name}_proj.bias"] = matrix(shape[0])
    if variant.norm_before_fc:
        tensors["input_norm.weight"] = norm(taps * target)
    if variant.fc_norm:
        tensors |= {f"fc_norm.{i}.weight": norm(target) for i in range(taps)}
    if variant.own_embedding:
        tensors["embed_tokens.weight"] = matrix(config.vocab_size, WIDTH)
    if variant.draft_vocab:
        ids = torch.randperm(config.vocab_size, generator=generator)[: variant.draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        tensors["lm_head.weight"] = matrix(len(ids), WIDTH)
    return tensors


def save_draft(
    folder: Path, config: PretrainedConfig, variant: Variant = Variant(), layout: str = "original", seed: int = 0
) -> Path:
    """A draft of random weights for a target of that configuration; the layouts hold the same draft."""
    tensors = draft_tensors(config, variant, seed)
    layer: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "max_position_embeddings": 512,
        "attention_bias": variant.bias,
        "mlp_bias": variant.bias,
    }
    if variant.window:
        layer |= {"layer_types": ["sliding_attention"], "sliding_window": variant.window}
    flags = {
        name: getattr(variant, name) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    }
    ids = list(variant.layer_ids)
    whole = {**flags, "draft_vocab_size": variant.draft_vocab or config.vocab_size}
    if layout == "original":
        settings = {
            **layer,
            **whole,
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
            "torch_dtype": "float32",
        }
    else:
        layer["rope_parameters"] = {"rope_type": "default", "rope_theta": layer.pop("rope_theta")}
        settings = {
            **whole,
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.3.0",
            "eagle_aux_hidden_state_layer_ids": ids,
            "target_hidden_size": None,
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
                "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "target"},
            },
        }
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


class PlainDraft:
    """One sequence, no cache: every token runs everything again. float64."""

    def __init__(self, target: PreTrainedModel, variant: Variant, seed: int = 0) -> None:
        self.target, self.variant = target, variant
        self.tensors = {n: t.double() for n, t in draft_tensors(target.config, variant, seed).items()}
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def draft(self, tokens: Sequence[int], count: int) -> tuple[list[int], float]:
        """The tokens that follow `tokens`, and the smallest distance of two best logits that chose them."""
        tokens = list(tokens)
        fed = list(self.features(tuple(tokens[:-1])))
        drafted: list[int] = []
        gap = float("inf")
        while len(drafted) < count:
            logits, output = self.last(tokens[1:] + drafted, fed)
            best = logits.topk(2).values
            gap = min(gap, float(best[0] - best[1]))
            chosen = int(logits.argmax())
            drafted.append(chosen + int(self.tensors["d2t"][chosen]) if "d2t" in self.tensors else chosen)
            fed.append(output)
        return drafted, gap

    @torch.no_grad()
    def features(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """g [T, width] of each token, from the target's own causal forward: a longer one's beginning will do."""
        longer = next((known for known in self.known if known[: len(tokens)] == tokens), None)
        if longer is not None:
            return self.known[longer][: len(tokens)]
        states: dict[int, torch.Tensor] = {}
        layers = self.target.model.layers
        hooks = [
            layers[i - 1].register_forward_hook(
                lambda _, __, out, i=i: states.__setitem__(i, out[0] if isinstance(out, tuple) else out)
            )
            for i in self.variant.layer_ids
        ]
        self.target(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        chosen = [states[i].view(len(tokens), -1).double() for i in self.variant.layer_ids]
        if self.variant.fc_norm:
            chosen = [self.norm(state, f"fc_norm.{i}") for i, state in enumerate(chosen)]
        joined = torch.cat(chosen, dim=1)
        if self.variant.norm_before_fc:
            joined = self.norm(joined, "input_norm")
        self.known[tokens] = joined @ self.tensors["fc.weight"].T
        return self.known[tokens]

    def last(self, tokens: Sequence[int], fed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after the last pair of token and feature, and what its successor is fed."""
        table = self.tensors.get("embed_tokens.weight", self.target.get_parameter("model.embed_tokens.weight").double())
        features = self.norm(torch.stack(list(fed)), "midlayer.hidden_norm")
        rows = torch.cat((self.norm(table[list(tokens)], "midlayer.input_layernorm"), features), dim=1)
        place = len(rows) - 1
        query = self.turned(self.product(rows[place:], "self_attn.q").view(1, HEADS, DIM), range(place, place + 1))[0]
        lowest = 0 if self.variant.window is None else max(0, place - self.variant.window + 1)
        seen = range(lowest, place + 1)
        keys = self.turned(self.product(rows[lowest:], "self_attn.k").view(-1, KV_HEADS, DIM), seen)
        values = self.product(rows[lowest:], "self_attn.v").view(-1, KV_HEADS, DIM)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            weights = (keys[:, group] @ query[head] / DIM**0.5).softmax(0)
            heads.append(weights @ values[:, group])
        feature = fed[place]
        stream = self.norm(feature, "midlayer.hidden_norm") if self.variant.norm_before_residual else feature
        stream = stream + self.product(torch.cat(heads), "self_attn.o")
        normed = self.norm(stream, "midlayer.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.product(normed, "mlp.gate"))
        stream = stream + self.product(gate * self.product(normed, "mlp.up"), "mlp.down")
        normed = self.norm(stream, "norm")
        head_weight = self.tensors.get("lm_head.weight", self.target.get_output_embeddings().weight.double())
        return head_weight @ normed, (normed if self.variant.norm_output else stream)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.tensors[f"{name}.weight"]

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.tensors.get(f"midlayer.{name}_proj.bias")
        out = x @ self.tensors[f"midlayer.{name}_proj.weight"].T
        return out if bias is None else out + bias

    def turned(self, heads: torch.Tensor, positions: range) -> torch.Tensor:
        """heads [T, heads, DIM] at consecutive positions."""
        frequencies = THETA ** (-torch.arange(0, DIM, 2).double() / DIM)
        angles = (torch.tensor(list(positions)).unsqueeze(1) * frequencies).unsqueeze(1)
        left, right = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
