"""The GGUF reader agrees with gguf's own on good files and refuses broken ones with a clear error."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.errors import ModelLoadError
from engine.hub.gguf_convert import convert_into
from engine.hub.gguf_reader import read_gguf, shortest
from tests.unit.gguf_files import write_gguf


def test_metadata_and_tensors_are_those_of_the_reference_reader(tmp_path: Path) -> None:
    extra = {"x.floats": [0.5, -1.0], "x.flags": [True, False], "x.negative": [-3, 4], "x.text": "é\n", "x.none": [""]}
    path = write_gguf(tmp_path / "m.gguf", keys=extra)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        expected = (tuple(map(int, tensor.shape[::-1])), tensor.data_offset, int(tensor.tensor_type))
        assert (info.shape, info.offset, info.kind) == expected


def test_numbers_have_their_shortest_form() -> None:
    assert shortest(float(np.float32(1e-5))) == 1e-5
    assert shortest(float(np.float32(9.99999e-07))) == 9.99999e-07
    assert shortest(1e6) == 1e6


@pytest.mark.parametrize(
    ("keys", "read", "message"),
    [
        ({"llama.block_count": "2"}, "integer:llama.block_count", "expected a whole number"),
        ({"llama.block_count": True}, "integer:llama.block_count", "expected a whole number"),
        ({}, "integer:llama.nothing", "absent"),
        ({"llama.x": "a"}, "number:llama.x", "expected a number"),
        ({"llama.x": float("nan")}, "number:llama.x", "expected a number"),
        ({"llama.x": [1, 2]}, "integer:llama.x", "expected a whole number"),
        ({"llama.x": [1, 2]}, "strings:llama.x", "expected a list of texts"),
        ({"llama.x": ["a"]}, "numbers:llama.x", "expected a list of numbers"),
        ({"llama.x": 1}, "string:llama.x", "expected str"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, keys: dict[str, object], read: str, message: str) -> None:
    method, _, key = read.partition(":")
    file = read_gguf(write_gguf(tmp_path / "m.gguf", keys=keys))
    with pytest.raises(ModelLoadError, match=f"{key} is .*{message}|{key} is {message}"):
        getattr(file, method)(key)


def test_a_list_of_equal_numbers_is_one_number(tmp_path: Path) -> None:
    assert read_gguf(write_gguf(tmp_path / "m.gguf", keys={"llama.x": [7, 7]})).integer("llama.x") == 7


def _header(tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "empty": (b"", "not a GGUF"),
    "other magic": (_header(magic=b"GGML"), "not a GGUF"),
    "old version": (_header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless keys": (_header(keys=1 << 60), "past the end"),
    "endless tensors": (_header(tensors=1 << 60), "past the end"),
    "endless text": (_header(keys=1) + struct.pack("<Q", 1 << 60) + b"x" * 64, "past the end"),
    "endless array": (_header(keys=1) + _text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60), "past the end"),
    "unknown type": (_header(keys=1) + _text(b"a") + struct.pack("<I", 99) + b"x" * 64, "unknown type 99"),
    "no text": (_header(keys=1) + _text(b"\xff") + struct.pack("<IB", 0, 1) + b"x" * 64, "not UTF-8"),
    "same key twice": (_header(keys=2) + (_text(b"a") + struct.pack("<IB", 0, 1)) * 2 + b"x" * 64, "twice"),
    "deep arrays": (_header(keys=1) + _text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, "type 9"),
    "five dimensions": (_header(tensors=1) + _text(b"a") + struct.pack("<I5QIQ", 5, *[1] * 5, 0, 0), "5 dimensions"),
    "giant tensor": (_header(tensors=1) + _text(b"a") + struct.pack("<IQIQ", 1, 1 << 62, 0, 0), "does not fit"),
    "empty tensor": (_header(tensors=1) + _text(b"a") + struct.pack("<IQIQ", 1, 0, 0, 0), "does not fit"),
    "odd alignment": (_header(keys=1) + _text(b"general.alignment") + struct.pack("<II", 4, 3), "power of two"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelLoadError, match=message):
        read_gguf(tmp_path / "m.gguf")


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut, out = tmp_path / "cut.gguf", tmp_path / "out"
    out.mkdir()
    lengths = random.Random(0).sample(range(len(data) - 32), 40)
    for length in [*lengths, *range(0, 60, 7), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ModelLoadError):
            convert_into(cut, out)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, full: bool) -> None:
    data = write_gguf(tmp_path / "whole.gguf").read_bytes()
    broken, out, chosen, refused = tmp_path / "broken.gguf", tmp_path / "out", random.Random(1), 0
    out.mkdir()
    for _ in range(3000 if full else 40):
        changed = bytearray(data)
        for _ in range(3):
            changed[chosen.randrange(12_000)] = chosen.randrange(256)
        broken.write_bytes(changed)
        try:
            convert_into(broken, out)
        except ModelLoadError:
            refused += 1
    assert refused > 20
