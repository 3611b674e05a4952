"""Turn a GGUF file into a Hugging Face folder, once: the result is kept in a cache folder under a content key."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.errors import ModelLoadError
from engine.hub.gguf_arch import Architecture, Placement, find_architecture, place_tensors
from engine.hub.gguf_reader import GGUFFile, read_gguf
from engine.hub.gguf_tensors import TensorSource
from engine.hub.gguf_tokenizer import Vocabulary, build_tokenizer, read_vocabulary
from engine.hub.safetensors_writer import Float32, check_safetensors, write_safetensors

CONVERTER_VERSION = 1  # raise it when the output for the same file changes
_SAMPLES, _SAMPLE = 64, 1 << 16  # pieces of a GGUF file that tell it apart, bytes of each
_STALE_SECONDS = 6 * 3600


def convert_gguf(path: Path, cache_dir: Path, on_phase: Callable[[str], None] | None = None) -> Path:
    """The converted folder for `path` under `cache_dir`; made first if it is not there.

    The work is done in a temporary folder that is renamed into place, so a folder with the final name is always
    whole, and two processes that convert at once both succeed. Raises ModelLoadError.
    """
    try:
        folder = cache_dir / f"{path.stem}-{_cache_key(path)}"
        if _is_whole(folder):
            return folder
        if on_phase is not None:
            on_phase(f"converting {path.name} (once)")
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache_dir)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache_dir))
        work.chmod(0o755)  # mkdtemp makes it private, but the cache may be shared
        try:
            convert_into(path, work)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelLoadError(f"{path.name} could not be converted in {cache_dir}: {error}") from error
    return folder


def convert_into(path: Path, folder: Path) -> None:
    """Write all files of the converted model into an existing folder. Raises ModelLoadError and OSError."""
    gguf = read_gguf(path)
    if gguf.metadata.get("split.count", 0) not in (0, 1):
        raise ModelLoadError(f"{path.name} is one part of several; join them first (llama-gguf-split --merge)")
    arch = find_architecture(gguf)
    with path.open("rb") as file:
        source = TensorSource(gguf, file)
        placements = place_tensors(gguf, arch)
        for info in gguf.tensors.values():
            source.check(info)
        vocabulary = write_tokenizer(gguf, folder)
        _write_configs(gguf, arch, source, vocabulary, folder)
        _write_weights(gguf, source, placements, folder)


def write_tokenizer(gguf: GGUFFile, folder: Path) -> Vocabulary:
    """Write tokenizer.json, tokenizer_config.json and the chat template into an existing folder."""
    vocabulary = read_vocabulary(gguf)
    tokenizer, config = build_tokenizer(gguf, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", config)
    if template := gguf.string("tokenizer.chat_template", ""):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return vocabulary


def _write_configs(
    gguf: GGUFFile, arch: Architecture, source: TensorSource, vocabulary: Vocabulary, folder: Path
) -> None:
    config = arch.config(gguf, source)
    rows = config["vocab_size"]
    if not isinstance(rows, int) or rows < len(vocabulary.tokens):
        raise ModelLoadError(f"{gguf.path.name}: {len(vocabulary.tokens)} tokens but an embedding of {rows} rows")
    ids = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
    known = {name: i for name, i in ids.items() if i is not None}
    _write_json(folder / "config.json", config | known)
    ends: dict[str, object] = {}
    if vocabulary.ends:
        ends["eos_token_id"] = vocabulary.ends[0] if len(vocabulary.ends) == 1 else list(vocabulary.ends)
    _write_json(folder / "generation_config.json", known | ends)


def _write_weights(gguf: GGUFFile, source: TensorSource, placements: dict[str, Placement], folder: Path) -> None:
    def chunks() -> Iterator[tuple[str, Iterator[Float32]]]:
        for name, placement in placements.items():
            yield placement.target, source.pieces(gguf.tensors[name], placement.transform)

    shapes = {}
    for name, placement in placements.items():
        shape = gguf.tensors[name].shape
        shapes[placement.target] = shape[::-1] if placement.transform.transpose else shape
    write_safetensors(folder / "model.safetensors", shapes, chunks())


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cache_key(path: Path) -> str:
    """A short hash of the file's size, of samples from all over it, and of the converter's version.

    Not of its time: a package that is installed again brings the same model with a new one.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {size}".encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    """Whether a finished conversion is there. A damaged one (a full disk, a crash) is removed."""
    if not folder.exists():
        return False
    try:
        check_safetensors(folder / "model.safetensors")
    except ModelLoadError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _publish(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError:
        if not _is_whole(folder):  # otherwise another process was faster, with the same result
            raise


def _remove_stale(cache_dir: Path) -> None:
    """Remove what killed conversions left behind."""
    for leftover in cache_dir.glob(".converting-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
