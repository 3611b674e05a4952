"""Tiny draft networks in real folders, and a drafter that helps them: its tokens are right where a test wants it.

The network drafts as ever and its context is kept as ever; only some of what it says is replaced, so that drafts of
random weights are accepted at length. What it really said is noted, by request and position.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from engine.drafters.dflash import DFlashDrafter
from engine.drafters.eagle3 import Eagle3Drafter
from engine.models.dflash.spec import DraftLayer
from engine.models.dflash.weights import tensor_shapes
from engine.models.eagle3.spec import Eagle3Spec
from engine.models.eagle3.tensors import shapes
from engine.protocols import DraftAsk, Drafter, DraftProposal, DraftSampler
from engine.registry import DRAFT_MODELS, DRAFTERS
from tests.tiny_drafts import tiny_spec, tiny_tensors
from training.checkpoint import save_zlab

RIGHT = 0.85  # share of drafted tokens that are made right, where the answer is known
ANSWERS: dict[str, list[int]] = {}  # prompt and output by request id, filled by the test; without, nobody is helped


@dataclass(frozen=True, slots=True)
class Said:
    """What the network drafted after one position: its tokens, and how sure it was of each."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


SAID: dict[tuple[str, int], Said] = {}  # by request id and position of the anchor


class Helped:
    """See `protocols.Drafter`: another one, helped and listened to."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.most, self.scores = drafter.most, drafter.scores
        self.admit, self.commit, self.drop = drafter.admit, drafter.commit, drafter.drop

    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        proposal = self._drafter.propose(asks, sampler, width)
        tokens, options = proposal.tokens.clone(), proposal.options
        best = None if options is None else options.tokens.clone()
        assert proposal.margins is not None or not any(proposal.lengths)
        for i, (ask, length) in enumerate(zip(asks, proposal.lengths, strict=True)):
            if not length:
                continue
            assert proposal.margins is not None
            margins = proposal.margins[i, :length].tolist()
            SAID[ask.request_id, ask.position] = Said(tuple(tokens[i, :length].tolist()), tuple(margins))
            for step, truth in self._help(ask, length):
                tokens[i, step] = truth
                if best is not None:
                    _put_in(best[i, step], truth)
        helped = options if options is None or best is None else replace(options, tokens=best)
        return replace(proposal, tokens=tokens, options=helped)

    def _help(self, ask: DraftAsk, length: int) -> Iterator[tuple[int, int]]:
        """(place in the draft, right token) where help is given; the same for the same request and position."""
        rng, known = random.Random(f"{ask.request_id}@{ask.position}"), ANSWERS.get(ask.request_id, [])
        for step in range(length):
            place = ask.position + 1 + step
            if rng.random() < RIGHT and place < len(known):
                yield step, known[place]


def _put_in(options: torch.Tensor, truth: int) -> None:
    """Make the right token the first or the second of some options, which all differ."""
    place = truth % 2
    options[options == truth] = options[place].clone()
    options[place] = truth


def helped_dflash(model: Any) -> Helped:
    return Helped(DFlashDrafter(model))


def helped_eagle3(model: Any) -> Helped:
    return Helped(Eagle3Drafter(model))


@contextmanager
def registered() -> Iterator[None]:
    """Within this, `helped-dflash` and `helped-eagle3` are names of drafters."""
    for name in ("dflash", "eagle3"):
        DRAFTERS[f"helped-{name}"] = f"{__name__}:helped_{name}"
        DRAFT_MODELS[f"helped-{name}"] = DRAFT_MODELS[name]
    try:
        yield
    finally:
        for name in ("dflash", "eagle3"):
            del DRAFTERS[f"helped-{name}"], DRAFT_MODELS[f"helped-{name}"]


def save_dflash(target: PretrainedConfig, folder: Path, **changes: Any) -> Path:
    """A random draft in z-lab's layout; `changes` of `tiny_drafts.tiny_spec`."""
    text = target.get_text_config()
    changes = {"taps": (0, 1), "rope": (("rope_theta", 1e4), ("rope_type", "default"))} | changes
    spec = tiny_spec(text, **changes)
    save_zlab(folder, spec, tiny_tensors(spec), {"num_target_layers": text.num_hidden_layers})
    return folder


def save_echo(target: PreTrainedModel, folder: Path) -> Path:
    """A draft that nobody has to help where a text goes round in one place: it says what the last tokens would say.

    Its one layer takes the mean of the target's last hidden states over a window of the context, and its own slots add
    nothing: for a Llama whose next token stays the same, that is the target's own next token.
    """
    text = target.config.get_text_config()
    width, heads = text.hidden_size, {"num_heads": 4, "num_kv_heads": 4, "head_dim": text.hidden_size // 4}
    layers, last = (DraftLayer(window=12),), text.num_hidden_layers - 1
    rope = (("rope_theta", 1e4), ("rope_type", "default"))
    spec = tiny_spec(
        text, taps=(last,), layers=layers, rope=rope, block_size=8, rms_norm_eps=text.rms_norm_eps, **heads
    )
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()}
    for name in ("fc", "layers.0.self_attn.v_proj", "layers.0.self_attn.o_proj"):
        tensors[f"{name}.weight"] = torch.eye(width) * (50 if name.endswith("o_proj") else 1)
    tensors["hidden_norm.weight"] += 1
    tensors["norm.weight"] = target.get_parameter("model.norm.weight").detach().clone()
    save_zlab(folder, spec, tensors, {"num_target_layers": text.num_hidden_layers})
    return folder


def save_eagle3(target: PretrainedConfig, folder: Path) -> Path:
    """A random draft in the original layout: its vocabulary is half of the target's."""
    text = target.get_text_config()
    width, vocabulary = text.hidden_size, text.vocab_size
    spec = Eagle3Spec(width, width, 48, 4, 2, 16, (0, 1, 2), vocabulary, vocabulary // 2)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name.replace("layers.0", "midlayer"): torch.randn(shape, generator=generator) * 0.15 + (len(shape) == 1)
        for name, shape in shapes(spec).items()
    }
    tensors["d2t"] = torch.arange(vocabulary // 2)  # offsets: every second id
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": vocabulary,
        "draft_vocab_size": spec.draft_vocab_size,
        "rope_theta": 1e4,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
