"""The trained head of `diversed`: at every drafted position, how much of the target the verification law keeps.

A linear probe on the draft's last hidden state and the target's, after its final norm, plus a bias for each place in
the draft; a sigmoid makes it a weight. DIVERSED's two outputs with a softmax are the same function; the bias by place
is ours, as drafts get worse with depth. A head belongs to one target and one draft: the folder holds a fingerprint of
both, and any other pair is refused.

Format: config.json and model.safetensors with draft.weight [draft width], target.weight [target width] and
bias [places], all float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.errors import ModelLoadError
from engine.models.draft_files import Settings, check_finite, read_settings, read_tensors
from engine.models.fingerprint import fingerprint

ARCHITECTURE = "SlipstreamVerifierHead"
VERSION = 1


@dataclass(frozen=True, slots=True)
class PairPart:
    """One network of a pair: where its checkpoint is, and the width of the hidden states that `verify` gets of it."""

    folder: Path
    width: int


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What config.json says. `target` and `draft` are fingerprints; `places` counts biases, one for each place."""

    target_width: int
    draft_width: int
    places: int
    target: str
    draft: str
    task: str = ""


class VerifierHead:
    """See `protocols.VerifierHead`. Places past the last bias get the last one."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._draft = tensors["draft.weight"].to(device, torch.float32)
        self._target = tensors["target.weight"].to(device, torch.float32)
        self._bias = tensors["bias"].to(device, torch.float32)

    @torch.inference_mode()
    def weights(self, hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """hidden [n, k, draft width] and states [n, k, target width] -> [n, k] float32 in (0, 1)."""
        places = torch.arange(hidden.shape[1], device=self._bias.device).clamp(max=len(self._bias) - 1)
        return (hidden.float() @ self._draft + states.float() @ self._target + self._bias[places]).sigmoid()


def load_head(folder: Path, target: PairPart, draft: PairPart, device: torch.device) -> VerifierHead:
    """The head in `folder`, for this target and this draft. Raises ModelLoadError that names the file and the field."""
    settings = read_settings(folder)
    spec = _spec(settings)
    for name, ours, given in (("target", spec.target_width, target.width), ("draft", spec.draft_width, draft.width)):
        if ours != given:
            raise settings_error(settings, f"{name}_width is {ours}, but hidden states of this {name} have {given}")
    for name, known, part in (("target", spec.target, target), ("draft", spec.draft, draft)):
        if known != fingerprint(part.folder):
            raise settings_error(
                settings,
                f"{name}_fingerprint is not that of {part.folder.name}: this head was trained for another {name}, "
                "and would weigh at random here; train one for this pair (slipstream train-verifier)",
            )
    tensors = read_tensors(folder)
    where = f"{folder.name}: model.safetensors"
    shapes = tensor_shapes(spec)
    if missing := sorted(shapes.keys() ^ tensors.keys()):
        raise ModelLoadError(f"{where}: {', '.join(missing)}: it must hold {', '.join(shapes)} and nothing else")
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != torch.float32:
            raise ModelLoadError(f"{where}: {name} is {found.dtype} {list(found.shape)}; it must be float32 {shape}")
    check_finite(tensors, where)
    return VerifierHead(tensors, device)


def save_head(folder: Path, spec: HeadSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what `load_head` reads. `tensors` are those of `tensor_shapes(spec)`, float32."""
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(spec)
    config = {
        "architectures": [ARCHITECTURE],
        "head_version": VERSION,
        "task": spec.task,
        "target_width": spec.target_width,
        "draft_width": spec.draft_width,
        "places": spec.places,
        "target_fingerprint": spec.target,
        "draft_fingerprint": spec.draft,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_shapes(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a head's tensors."""
    return {"draft.weight": (spec.draft_width,), "target.weight": (spec.target_width,), "bias": (spec.places,)}


def settings_error(settings: Settings, reason: str) -> ModelLoadError:
    """An error of config.json."""
    return ModelLoadError(f"{settings.where}: {reason}")


def _spec(settings: Settings) -> HeadSpec:
    kinds = settings.raw("architectures")
    if not isinstance(kinds, list) or ARCHITECTURE not in kinds:
        raise settings_error(
            settings, f"architectures is {json.dumps(kinds)[:80]}; a verifier's head is {ARCHITECTURE}"
        )
    if (version := settings.integer("head_version")) != VERSION:
        raise settings_error(settings, f"head_version is {version}; version {VERSION} can be read")
    spec = HeadSpec(
        target_width=settings.integer("target_width"),
        draft_width=settings.integer("draft_width"),
        places=settings.integer("places"),
        target=settings.text("target_fingerprint", ""),
        draft=settings.text("draft_fingerprint", ""),
        task=settings.text("task", ""),
    )
    if spec.places < 1:
        raise settings_error(settings, f"places is {spec.places}; it must be at least 1")
    settings.refuse_unread()
    return spec
