"""Random drafts in every published layout: config.json as a dictionary and tensors, from one spec."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.models.dflash.spec import DFlashSpec, DraftLayer
from engine.models.draft_files import TargetFacts
from tests.tiny import tiny_config
from tests.tiny_drafts import tiny_spec
from training.checkpoint import zlab_config

Tensors = dict[str, torch.Tensor]
Json = dict[str, object]

TARGET_CONFIG = tiny_config("qwen3")
TARGET = TargetFacts.of(TARGET_CONFIG)
PLAIN = tiny_spec(
    TARGET_CONFIG,
    layers=(DraftLayer(), DraftLayer(window=6, causal=True)),
    rms_norm_eps=1e-5,
    rope=(("rope_theta", 5000.0), ("rope_type", "default")),
    max_position_embeddings=512,
)
SMALL_VOCABULARY = replace(PLAIN, draft_vocab_size=40, own_head=True)
DSPARK = replace(
    PLAIN,
    anchor_predicts=True,
    markov_rank=3,
    confidence_head=True,
    confidence_with_markov=True,
    layers=(DraftLayer(),),
)
DFLASH2 = replace(
    PLAIN,
    layers=(DraftLayer(window=6), DraftLayer(window=6)),
    conv_kernel=2,
    conv_group=16,
    selector_rank=5,
    selector_top_k=4,
    embedding_scale=2.0,
    logit_scale=0.5,
    logit_softcap=30.0,
)


@dataclass(slots=True)
class Checkpoint:
    """What a folder will hold; tests spoil it before they write it."""

    config: Json
    tensors: Tensors
    shards: int = 1

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.tensors)
        parts = [names[start :: self.shards] for start in range(self.shards)]
        files = {f"model-{i}-of-{self.shards}.safetensors": part for i, part in enumerate(parts)}
        if self.shards == 1:
            files = {"model.safetensors": names}
        else:
            weight_map = {name: file for file, part in files.items() for name in part}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, part in files.items():
            save_file({name: self.tensors[name].contiguous() for name in part}, folder / file)
        return folder


Writer = Callable[[DFlashSpec, Tensors], Checkpoint]


def zlab(spec: DFlashSpec, tensors: Tensors) -> Checkpoint:
    return Checkpoint(zlab_config(spec, TARGET.num_layers, torch.float32), _offsets(tensors))


def zlab_newer(spec: DFlashSpec, tensors: Tensors) -> Checkpoint:
    """Everything in dflash_config, rope_parameters of transformers 5, a prefix, shards, keys of no meaning."""
    made = zlab(spec, tensors)
    own = made.config["dflash_config"]
    assert isinstance(own, dict)
    own |= {key: made.config.pop(key) for key in ("block_size", "num_target_layers")}
    theta, _ = made.config.pop("rope_theta"), made.config.pop("rope_scaling")
    made.config |= {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "auto_map": {"AutoModel": "x.Y"}}
    return Checkpoint(made.config, {f"model.{name}": tensor for name, tensor in made.tensors.items()}, shards=3)


def flat(spec: DFlashSpec, tensors: Tensors) -> Checkpoint:
    """Everything at the top."""
    made = zlab(spec, tensors)
    own = made.config.pop("dflash_config")
    assert isinstance(own, dict)
    return Checkpoint(made.config | own, made.tensors)


def deepspec(spec: DFlashSpec, tensors: Tensors) -> Checkpoint:
    """DSpark with flat keys, which lets the anchor predict without saying so, and copies of embedding and head."""
    made = flat(spec, tensors)
    del made.config["sample_from_anchor"]
    made.config |= {"architectures": ["Qwen3DSparkModel"], "num_anchors": 512}
    return Checkpoint(made.config, made.tensors | copies(spec))


def specforge(spec: DFlashSpec, tensors: Tensors) -> Checkpoint:
    """DSpark nested; the confidence head follows from the weight of its loss."""
    made = zlab(spec, tensors)
    own = made.config["dflash_config"]
    assert isinstance(own, dict)
    for key in ("sample_from_anchor", "enable_confidence_head"):
        del own[key]
    own |= {"projector_type": "dspark", "attention_mode": "gqa", "confidence_head_alpha": 1.0}
    return Checkpoint(made.config | {"architectures": ["DSparkDraftModel"]}, made.tensors)


def speculators(spec: DFlashSpec, tensors: Tensors) -> Checkpoint:
    """The library's: taps from 1, the transformer in its own section, embedding and head stored, t2d beside d2t."""
    network = zlab(spec, tensors).config
    own = network.pop("dflash_config")
    assert isinstance(own, dict)
    kind = "dflash2" if spec.selector_rank else "dspark" if spec.markov_rank else "dflash"
    config: Json = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.4.0",
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "some/model"}},
        "block_size": network.pop("block_size"),
        "draft_vocab_size": spec.draft_vocab_size,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in own.pop("target_layer_ids")],
        "target_hidden_size": None,
        "sliding_window_non_causal": not any(layer.causal for layer in spec.layers),
        "sample_from_anchor": own.pop("sample_from_anchor", False),
        **own,
    }
    for key in ("num_target_layers", "architectures", "draft_vocab_size", "is_causal"):
        network.pop(key, None)
    stored = copies(spec) | _offsets(tensors)
    if "d2t" in tensors:
        stored["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool).index_fill(0, tensors["d2t"], True)
    return Checkpoint(config | {"transformer_layer_config": network}, stored)


def copies(spec: DFlashSpec) -> Tensors:
    """Stands for the target's embedding and head."""
    generator = torch.Generator().manual_seed(11)
    names = ("embed_tokens.weight", "lm_head.weight")
    return {name: torch.randn(spec.vocab_size, spec.hidden_size, generator=generator) * 0.3 for name in names}


def _offsets(tensors: Tensors) -> Tensors:
    if "d2t" not in tensors:
        return dict(tensors)
    return tensors | {"d2t": tensors["d2t"] - torch.arange(len(tensors["d2t"]))}


# (spec, its layouts): all of a line hold the same draft.
LAYOUTS: dict[str, tuple[DFlashSpec, tuple[Writer, ...]]] = {
    "plain": (PLAIN, (zlab, zlab_newer, flat, speculators)),
    "small vocabulary": (SMALL_VOCABULARY, (zlab, zlab_newer, speculators)),
    "dspark": (DSPARK, (zlab, deepspec, specforge, speculators)),
    "dflash2": (DFLASH2, (zlab, zlab_newer, speculators)),
}
