"""Two processes beside the tests' own: triton decides at import whether it interprets or compiles, once and for all."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar
from unittest import mock

import pytest

Result = TypeVar("Result")
Run = Callable[..., Result]


def _process(environment: dict[str, str]) -> Iterator[ProcessPoolExecutor]:
    """A fresh Python process that starts with these variables."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment):
            pool.submit(os.getpid).result()  # the process starts now, not with the first test
        yield pool


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    yield from _process({"TRITON_INTERPRET": "1"})


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """Its compiler cache is empty: what the tests look at was compiled in this run."""
    cache = tmp_path_factory.mktemp("triton")
    yield from _process({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)})


@pytest.fixture
def interpreted(interpreter: ProcessPoolExecutor) -> Run:
    """Calls a function of `tests.kernels.interpreted`, by name, in the interpreter's process."""
    return lambda name, *args: interpreter.submit(_call, "tests.kernels.interpreted", name, args).result()


@pytest.fixture
def compiled(compiler: ProcessPoolExecutor) -> Run:
    """Calls a function of `tests.kernels.compiling`, by name, in the compiler's process."""
    return lambda name, *args: compiler.submit(_call, "tests.kernels.compiling", name, args).result()


def _call(module: str, name: str, args: tuple[object, ...]) -> object:
    return getattr(__import__(module, fromlist=[name]), name)(*args)
