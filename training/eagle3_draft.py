"""An EAGLE-3 draft on its way: made from a target and its answers, saved in the original layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.models.eagle3.spec import Eagle3Spec
from training import target
from training.batches import Corpus
from training.dflash import Recipe
from training.eagle3 import Eagle3Network, Eagle3Task
from training.shapes import Shape, vocabulary


class Eagle3Draft:
    """See `drafts.Draft`. A chain is a token shorter than `block_size`, so that both kinds draft the same number.

    It always starts at random: the target's last layer knows nothing of the token's half of the input, and as a start
    it kept the loss higher for longer.
    """

    def __init__(self, folder: Path, corpus: Corpus, shape: Shape, device: torch.device) -> None:
        last = target.last_layer(folder)
        if not all(0 <= tap <= last for tap in shape.taps):
            raise ConfigError(f"--taps {shape.taps}: the target's layers are 0 to {last}")
        if shape.layers != 1 or shape.markov_rank or shape.anchor_predicts:
            raise ConfigError("--layers, --markov-rank and --anchor-predicts: an EAGLE-3 draft has one plain layer")
        parts = target.load(folder)
        self._vocabulary = vocabulary(corpus.counts(len(parts.embedding)), shape.draft_vocab)
        self._spec = eagle3_spec(parts, shape, len(self._vocabulary))
        width = self._spec.target_hidden_size
        scale = corpus.scale(corpus.columns(shape.taps, width))
        self._network = Eagle3Network(self._spec, scale).to(device)
        self._parts, self._corpus, self._shape = parts, corpus, shape
        columns = corpus.columns((*shape.taps, last), width)
        recipe = Recipe(shape.decay, shape.hard)
        self.task = Eagle3Task(self._network, parts, self._vocabulary, columns, recipe, device)

    @staticmethod
    def default_taps(layers: int) -> tuple[int, ...]:
        """Early, middle and late: those of the paper for three taps, so that DFlash's data holds them."""
        return tuple(sorted({max(0, round(1 + i * (layers - 4) / 2)) for i in range(3)}))

    def save(self, folder: Path) -> None:
        head = self._parts.head[self._vocabulary]
        save_original(folder, self._spec, {**self._network.folded(), "lm_head.weight": head}, self._vocabulary)

    def facts(self) -> dict[str, object]:
        """Lines of the card."""
        spec = self._spec
        return {
            "layout": f"EAGLE-3's original one, trained to draft {spec.most} tokens",
            "target layers read": ", ".join(map(str, spec.taps)),
            "draft vocabulary": f"{spec.draft_vocab_size:,} of {spec.vocab_size:,} ids",
            "trained parameters": f"{sum(p.numel() for p in self._network.parameters()):,}",
            "answers": f"{len(self._corpus.training):,} with {self._corpus.tokens:,} tokens, by the target itself",
            "loss": f"{self._shape.hard:g} label + {1 - self._shape.hard:g} target's law, gamma {self._shape.decay:g}",
        }


def eagle3_spec(parts: target.TargetParts, shape: Shape, draft_vocab: int) -> Eagle3Spec:
    """A draft of the target's own sizes."""
    config = parts.config
    return Eagle3Spec(
        hidden_size=config.hidden_size,
        target_hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        taps=shape.taps,
        vocab_size=len(parts.embedding),
        draft_vocab_size=draft_vocab,
        most=shape.block_size - 1,
        rms_norm_eps=config.rms_norm_eps,
        rope=(("rope_theta", float(config.rope_parameters["rope_theta"])), ("rope_type", "default")),
        max_position_embeddings=config.max_position_embeddings,
        norm_before_residual=True,
        norm_output=True,
    )


def save_original(
    folder: Path, spec: Eagle3Spec, tensors: Mapping[str, torch.Tensor], vocabulary: torch.Tensor
) -> None:
    """config.json and model.safetensors in the layout of SafeAILab and SpecForge, weights in bfloat16.

    `tensors` by the layout's own names (`midlayer.`), the head's rows among them; `vocabulary` [draft vocabulary] the
    target's ids, rising, which are written as offsets with their mask t2d.
    """
    rope = dict(spec.rope)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": spec.attention_bias,
        "draft_vocab_size": spec.draft_vocab_size,
        "dtype": "bfloat16",
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in spec.taps],  # the streams that enter these layers
            "use_aux_hidden_state": True,
        },
        "fc_norm": spec.fc_norm,
        "head_dim": spec.head_dim,
        "hidden_act": spec.hidden_act,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "mlp_bias": spec.mlp_bias,
        "model_type": "llama",
        "norm_before_fc": spec.norm_before_fc,
        "norm_before_residual": spec.norm_before_residual,
        "norm_output": spec.norm_output,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": spec.num_kv_heads,
        "num_speculative_tokens": spec.most,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "target_hidden_size": spec.target_hidden_size,
        "tie_word_embeddings": False,
        "vocab_size": spec.vocab_size,
    }
    assert rope["rope_type"] == "default"
    stored = {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    stored["d2t"] = vocabulary - torch.arange(len(vocabulary))
    stored["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool).index_fill_(0, vocabulary, True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
