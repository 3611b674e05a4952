"""Packed models kept between starts: one file for each checkpoint and weight format, in the cache folder.

A file's key is made of all that its content follows from: the checkpoint's files, the format and its layout, what the
model is used for, the code that builds it and the version of `transformers`. Files that were not used for long go when
there are too many, and so do those of a checkpoint that has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.diffusion import DiffusionSpec
from engine.kernels.matrix import GROUPS, LAYOUT
from engine.models.stored_model import StoredModel
from engine.runtime.kv_cache import LayerShape
from engine.runtime.stored_backbone import dumped, make_model, model_form
from engine.runtime.stored_data import Keeper, Reader, Unstorable
from engine.runtime.weight_file import BadWeightFile, map_file, write_file

logger = logging.getLogger(__name__)

_SIZES = ("kv_heads", "key_dim", "value_dim")  # of a LayerShape
FOLDER = "packed"  # inside the cache folder
MOST_FILES, MOST_BYTES = 24, 64 << 30  # that stay besides the newest
_STALE_SECONDS = 3600.0
_CODE = ("models", "runtime/stored_*.py", "runtime/weight_*.py", "runtime/packing.py", "kernels/reference_matrix.py")


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A model from a file, with what the checks at load need. `expected`: logits of the self-checks' rows."""

    model: StoredModel
    shapes: tuple[LayerShape, ...]
    expected: list[torch.Tensor]
    tipped: float
    fused: str  # in words
    path: Path


class WeightStore:
    """The file of one checkpoint in one format; `cache` is the server's cache folder."""

    def __init__(self, cache: Path, folder: Path, quant: str, spec: DiffusionSpec | None) -> None:
        self._place = cache / FOLDER
        source = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self._family = f"{folder.name[:80]}-{source}-{quant}-"  # of the same checkpoint, whenever it was packed
        self.path = self._place / f"{self._family}{_key(folder, quant, spec)}.safetensors"

    def read(self) -> Stored | None:
        """The model in the file; None where there is none, or a damaged one, which is removed."""
        try:
            text, tensors = map_file(self.path)
            form = Reader(json.loads(text), tensors)
            model = make_model(form.child("model"))
            sizes = zip(*(form.integers(name) for name in _SIZES), strict=True)
            shapes = tuple(LayerShape(*size) for size in sizes)
            stored = Stored(
                model, shapes, form.listed_tensors("expected"), form.number("tipped"), form.text("fused"), self.path
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s can't be read: %s", self.path, error.strerror or error)
            return None
        except (BadWeightFile, ValueError, KeyError, TypeError, AssertionError) as error:
            logger.warning("%s can't be used and is made anew: %s", self.path.name, error)
            self.remove()
            return None
        with contextlib.suppress(OSError):  # a cache that this process may only read
            os.utime(self.path)  # it was used
        return stored

    def write(
        self,
        model: torch.nn.Module,
        shapes: tuple[LayerShape, ...],
        expected: list[torch.Tensor],
        tipped: float,
        fused: str,
    ) -> bool:
        """Keep a fused and packed model; False where that is not possible, and the log says why."""
        keeper = Keeper()
        try:
            form = {
                "model": model_form(model, keeper),
                **{name: [getattr(shape, name) for shape in shapes] for name in _SIZES},
                "expected": [keeper.keep(logits) for logits in expected],
                "tipped": tipped,
                "fused": fused,
            }
            self._place.mkdir(parents=True, exist_ok=True)
            size = sum(tensor.nbytes for tensor in keeper.tensors.values())
            if shutil.disk_usage(self._place).free < 2 * size:
                raise OSError(f"{self._place} has no room for {size >> 20} MiB")
            write_file(self.path, dumped(form), keeper.tensors)
            _prune(self._place, self.path, self._family)
        except Unstorable as error:
            logger.info("the packed weights are not kept for the next start: %s", error)
            return False
        except OSError as error:
            logger.warning("the packed weights can't be kept for the next start: %s", error.strerror or error)
            return False
        return True

    def remove(self) -> None:
        """Take a file away that is of no use."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s can't be removed: %s", self.path, error.strerror or error)


def _key(folder: Path, quant: str, spec: DiffusionSpec | None) -> str:
    """A hash of what a file's content follows from. Configurations count by content, weights by size and time."""
    digest = hashlib.sha256(repr((quant, GROUPS, LAYOUT, spec, torch.__version__, _version(), _code())).encode())
    for file in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} ".encode())
        whole = file.name in ("config.json", "model.safetensors.index.json")
        digest.update(file.read_bytes() if whole else str(status.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def _version() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def _code() -> str:
    """A hash of the code that decides what a file holds: nobody has to count versions."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for pattern in _CODE:
        found = (root / pattern).rglob("*.py") if "*" not in pattern else root.glob(pattern)
        for file in sorted(found):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _prune(place: Path, kept: Path, family: str) -> None:
    """Remove what the new file replaces, what has not been used for longest, and what killed writers left."""
    found = []
    for file in place.glob("*.safetensors"):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process was faster
            continue
        if file.name.startswith(family) and file != kept:
            file.unlink(missing_ok=True)
        elif file != kept:
            found.append((status.st_mtime, status.st_size, file))
    held = 0
    for count, (_, size, file) in enumerate(sorted(found, reverse=True)):
        held += size
        if count >= MOST_FILES or held > MOST_BYTES:
            file.unlink(missing_ok=True)
    for leftover in place.glob(".writing-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            leftover.unlink(missing_ok=True)
