"""The demo model's tokenizer, built once per test run from the metadata of its GGUF file (without its weights)."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from engine.hub.gguf_convert import write_tokenizer
from engine.hub.gguf_reader import read_gguf
from engine.hub.resolve import find_demo
from engine.tokenizer.tokenizer import Tokenizer


@cache
def demo_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(read_gguf(find_demo()), Path(folder))
        return Tokenizer.load(Path(folder))
