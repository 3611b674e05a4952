"""Which network a folder holds, whatever the folder is called and however its tensors are split over files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from engine.errors import ModelLoadError
from engine.hub.resolve import validate_folder

_SAMPLE = 256  # bytes of a tensor at its begin, middle and end
_ESSENTIALS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps rope_theta rope_scaling vocab_size draft_vocab_size block_size dflash_config"
)


def fingerprint(folder: Path) -> str:
    """sha256 over what the configuration computes, and names, types, shapes and a sample of the bytes of all tensors.

    Cheap: some hundred bytes of each tensor are read. Raises ModelLoadError for a folder that is no checkpoint.
    """
    validate_folder(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entries = sorted(entry for file in sorted(folder.glob("*.safetensors")) for entry in _tensors(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{folder.name}: it can't be told which network this is: {error}") from error
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    essentials = {key: text[key] for key in _ESSENTIALS.split() if text.get(key) is not None}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    for name, description, sample in entries:
        digest.update(f"\n{name} {description} ".encode())
        digest.update(sample)
    return digest.hexdigest()


def _tensors(path: Path) -> list[tuple[str, str, bytes]]:
    """Name, type with shape, and some bytes of each tensor of a file."""
    found = []
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            last = max(start, end - _SAMPLE)
            sample = b""
            for place in (start, (start + last) // 2, last):
                file.seek(8 + length + place)
                sample += file.read(min(_SAMPLE, end - place))
            found.append((name, f"{entry['dtype']} {entry['shape']}", sample))
    return found
