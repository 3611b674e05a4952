"""Packed models between starts: mapped back they say the same, bit for bit; what is damaged or old is made anew."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors import safe_open

from engine.config import ModelConfig
from engine.errors import ModelLoadError
from engine.models import selfcheck
from engine.models.fused.embedding import HalfEmbedding, PackedEmbedding
from engine.models.stored_model import StoredModel
from engine.runtime import weight_store
from engine.runtime.linear import NativeLinear
from engine.runtime.loading import LoadedModel, load_checked
from engine.runtime.weight_file import ALIGNMENT, BadWeightFile, map_file, write_file
from tests.families import family, save_random
from tests.tiny import save_tiny

# Scaled embeddings and two rotary embeddings; a scale of logits, and a cap; biases and windows; frequencies that change
# with the length; scaled ones; pairs of neighbours.
FAMILIES = ("gemma3_text", "granite", "gemma2", "qwen2", "phi3-longrope", "llama-yarn", "glm4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("stored") / "llama")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, cache: Path | None, quant: str = "int8") -> LoadedModel:
    return load_checked(ModelConfig(str(folder), quant=quant, device="cpu"), folder, lambda _: None, "auto", cache)


def logits(loaded: LoadedModel) -> torch.Tensor:
    placement = loaded.placement
    return torch.cat(selfcheck.paged_logits(loaded.adapter, loaded.shapes, loaded.attention, placement.pool))


def is_stored(loaded: LoadedModel) -> bool:
    model: object = loaded.adapter.model
    return isinstance(model, StoredModel)


def files(cache: Path) -> list[Path]:
    return sorted((cache / weight_store.FOLDER).iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    save_random(family(name).config(), place)
    plain = load(place, None)
    assert not is_stored(plain)
    want = logits(plain)
    for _ in range(2):
        again = load(place, tmp_path / "cache")
        assert is_stored(again)
        assert torch.equal(logits(again), want)
        assert (again.shapes, again.context_length) == (plain.shapes, plain.context_length)
        assert again.numerics == plain.numerics
    assert len(files(tmp_path / "cache")) == 1


@pytest.mark.parametrize(("quant", "head", "table"), [("fp16", "fp16", "fp16"), ("int4", "int8", "int8")])
def test_a_tied_table_is_the_packed_head(folder: Path, tmp_path: Path, quant: str, head: str, table: str) -> None:
    for _ in range(2):
        model = load(folder, tmp_path, quant).adapter.model
        embedding, out = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, PackedEmbedding) and isinstance(out, NativeLinear)
        assert (embedding.matrix.format, out.matrix.format) == (table, head)
        tensors = embedding.matrix.tensors(), out.matrix.tensors()
        assert [t.data_ptr() for t in tensors[0].values()] == [t.data_ptr() for t in tensors[1].values()]
        ids = torch.tensor([[0, 258, 31, 32]])
        assert torch.equal(embedding(ids), embedding.weight[ids]) and torch.equal(embedding.weight, out.weight)


def test_a_table_of_its_own_is_kept_in_fp16(tmp_path: Path) -> None:
    place = save_tiny("qwen3", tmp_path / "qwen3")
    stored = {}
    with safe_open(place / "model.safetensors", framework="pt") as file:
        stored = file.get_tensor("model.embed_tokens.weight")
    embedding = load(place, tmp_path / "cache").adapter.model.get_input_embeddings()
    assert isinstance(embedding, HalfEmbedding) and torch.equal(embedding.table, stored.half())


def test_what_is_not_fused_is_loaded_anew_at_each_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = save_tiny("gpt2", tmp_path / "gpt2")
    with caplog.at_level(logging.INFO):
        assert not is_stored(load(place, tmp_path / "cache"))
    assert "not kept for the next start" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_exact_weights_are_not_kept(folder: Path, tmp_path: Path) -> None:
    assert not is_stored(load(folder, tmp_path, "none"))
    assert not list(tmp_path.iterdir())


# ---- files that can't be trusted ---------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[:-100]


def flip(data: bytes) -> bytes:
    return data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:]


def foreign(_: bytes) -> bytes:
    return b"something else"


def of_another_header(data: bytes) -> bytes:
    return data.replace(b'"fused', b'"fuses', 1)


@pytest.mark.parametrize("damage", [cut, flip, foreign, of_another_header, lambda data: b""])
def test_a_damaged_file_is_made_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    want = logits(load(folder, tmp_path))
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert torch.equal(logits(load(folder, tmp_path)), want)
    assert "made anew" in caplog.text and files(tmp_path) == [file]
    assert file.read_bytes() == whole


def test_weights_that_compute_something_else_are_refused_and_removed(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path)
    (file,) = files(tmp_path)
    text, tensors = map_file(file)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    codes = json.loads(text)["model"]["layers"][2]["children"]["mlp"]["down_proj"]["matrix"]["tensors"]["codes"]
    changed[codes] = changed[codes].flip(0)
    write_file(file, text, changed)
    with pytest.raises(ModelLoadError, match="paged forward differs"):
        load(folder, tmp_path)
    assert files(tmp_path) == []
    load(folder, tmp_path)


def test_a_cache_that_can_not_be_written_stops_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / weight_store.FOLDER).write_text("in the way")
    assert not is_stored(load(folder, tmp_path))
    assert "can't be kept" in caplog.text


# ---- which file ----------------------------------------------------------------------------------------------


def test_a_changed_checkpoint_replaces_its_file(tmp_path: Path) -> None:
    place, cache = save_tiny("llama", tmp_path / "llama"), tmp_path / "cache"
    load(place, cache)
    load(place, cache, "int4")
    before = files(cache)
    weights = place / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    load(place, cache)
    now = files(cache)
    assert len(before) == len(now) == 2 and len(set(before) & set(now)) == 1
    config = place / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-3}))
    assert not torch.equal(logits(load(place, cache)), logits(load(place, None, "int4")))
    assert len(set(now) & set(files(cache))) == 1


def test_old_files_go_when_there_are_too_many(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_store, "MOST_FILES", 2)
    place = tmp_path / weight_store.FOLDER
    place.mkdir()
    for age in range(4):
        (place / f"other-{age}.safetensors").write_bytes(b"x")
        os.utime(place / f"other-{age}.safetensors", (1e9 - age, 1e9 - age))
    (place / ".writing-killed").write_bytes(b"x")
    os.utime(place / ".writing-killed", (1e9, 1e9))
    load(folder, tmp_path)
    names = [file.name for file in files(tmp_path)]
    assert names[1:] == ["other-0.safetensors", "other-1.safetensors"] and names[0].startswith("llama-")


def test_a_mapped_start_does_without_transformers(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom engine.config import ModelConfig\n"
        "from engine.runtime.loading import load_checked\nimport engine.runtime.worker\n"
        f"config = ModelConfig({str(folder)!r}, quant='int8', device='cpu')\n"
        f"load_checked(config, Path({str(folder)!r}), lambda _: None, 'auto', Path({str(tmp_path)!r}))\n"
        "print(*sorted({'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""


# ---- the file itself -----------------------------------------------------------------------------------------


def test_a_file_is_aligned_and_can_be_read_by_others(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3, 5), "c": torch.randn(9).half()}
    path = tmp_path / "deep" / "file.safetensors"
    write_file(path, "text", tensors)
    text, found = map_file(path)
    assert text == "text" and found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.data_ptr() % ALIGNMENT == 0 and torch.equal(tensor, tensors[name])
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("b"), tensors["b"])
    found["a"].zero_()  # a private copy of its page
    assert torch.equal(map_file(path)[1]["a"], tensors["a"])


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path, tensors = tmp_path / "file.safetensors", {"a": torch.randn(100, 1000)}
    threads = [Thread(target=write_file, args=(path, "text", tensors)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(map_file(path)[1]["a"], tensors["a"])
    assert list(tmp_path.iterdir()) == [path]


def test_a_header_that_lies_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}" * 10)
    with pytest.raises(BadWeightFile):
        map_file(path)
