"""Answers and hidden states on disk: safetensors files of some thousand tokens each, written whole or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One answered prompt. `states` [len(tokens) - 1 or more, taps * width] float16: see `record`."""

    name: str
    tokens: list[int]
    prompt_len: int
    states: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Samples one after another. `starts` [n + 1] int64 says where each begins.

    `tokens` [T] int32, `prompt_lens` [n] int32, `states` [T, taps * width] float16 (zero at each sample's last token,
    which the target never computed).
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    prompt_lens: torch.Tensor
    states: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompt_lens)


def write(path: Path, samples: list[Sample], taps: tuple[int, ...]) -> None:
    """Write a shard so that it is there whole or not at all."""
    lengths = torch.tensor([0, *(len(sample.tokens) for sample in samples)])
    width = samples[0].states.shape[1]
    states = torch.zeros(int(lengths.sum()), width, dtype=torch.float16)
    starts = lengths.cumsum(0)
    for sample, start in zip(samples, starts.tolist(), strict=False):
        size = min(len(sample.tokens), len(sample.states))
        states[start : start + size] = sample.states[:size]
    tensors = {
        "tokens": torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int32),
        "starts": starts,
        "prompt_lens": torch.tensor([sample.prompt_len for sample in samples], dtype=torch.int32),
        "states": states,
    }
    part = path.with_suffix(".part")
    save_file(tensors, part, {"taps": ",".join(map(str, taps)), "names": ",".join(sample.name for sample in samples)})
    os.replace(part, path)


def read(path: Path) -> Shard:
    """A shard, with its states still on disk (mapped)."""
    with safe_open(path, "pt") as file:
        names = ("tokens", "starts", "prompt_lens", "states")
        return Shard(*(file.get_tensor(name) for name in names))


def taps_of(path: Path) -> tuple[int, ...]:
    """The layers whose outputs a shard holds, in their order."""
    return tuple(int(layer) for layer in _meta(path)["taps"].split(",") if layer)


def names_of(path: Path) -> list[str]:
    """The names of a shard's samples."""
    return _meta(path)["names"].split(",")


def path(folder: Path, number: int) -> Path:
    """Where shard `number` of a folder is or will be."""
    return folder / f"shard-{number:05d}.safetensors"


def next_number(folder: Path) -> int:
    """A number above those of all shards that are there: some before it may be missing."""
    return max((int(path.stem.removeprefix("shard-")) for path in paths(folder)), default=-1) + 1


def paths(folder: Path) -> list[Path]:
    """All whole shards of a folder."""
    return sorted(folder.glob("shard-*.safetensors"))


def _meta(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found
