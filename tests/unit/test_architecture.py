"""The house rules hold in this tree, and the checker finds what breaks them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import architecture
from tests.architecture import Source

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [architecture.arrow_violations, architecture.size_violations, architecture.habit_violations]


@pytest.fixture(scope="module")
def tree() -> list[Source]:
    return architecture.sources(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tree_keeps_the_house_rules(tree: list[Source], check: Callable[[list[Source]], Iterator[str]]) -> None:
    assert list(check(tree)) == []


def test_the_median_file_is_short(tree: list[Source]) -> None:
    assert statistics.median(source.lines for source in tree if source.lines) <= 130


def test_every_moved_limit_is_needed_and_has_a_reason(tree: list[Source]) -> None:
    paths = {source.path for source in tree}
    for (path, limit), (allowed, reason) in architecture.MOVED_LIMITS.items():
        assert path in paths and allowed > architecture.LIMITS[limit] and reason


def test_test_files_are_short_too() -> None:
    lengths = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in (ROOT / "tests").rglob("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > architecture.LIMITS["file"]} == {}


LONG_BODY = "\n".join("    x = 1" for _ in range(60))
PLANTED = {
    # arrows
    ("engine/core.py", "from engine.runtime.worker import LocalWorker"): "may not import engine.runtime.worker",
    ("engine/core.py", "def f():\n    from engine import async_engine"): "may not import engine.async_engine",
    ("engine/core.py", "from server import app"): "may not import server.app",
    ("engine/core.py", "from .runtime import worker"): "may not import engine.runtime.worker",
    ("engine/types.py", "import engine.errors"): "may not import engine.errors",
    ("engine/verifiers/strict.py", "from engine.drafters.ngram import x"): "may not import engine.drafters",
    ("engine/pipelines/speculative.py", "from engine.models.adapter import x"): "may not import engine.models.adapter",
    ("engine/runtime/sampler.py", "import engine.models.adapter"): "may not import engine.models.adapter",
    ("server/app.py", "import engine.core"): "may not import engine.core",
    ("training/train.py", "import server.app"): "may not import server.app",
    # third parties
    ("engine/core.py", "import torch.nn"): "torch is imported",
    ("engine/scheduling/scheduler.py", "try:\n    from torch import nn\nexcept ImportError: pass"): "torch is imported",
    ("server/app.py", "import transformers"): "transformers is imported",
    ("engine/hub/demo.py", "import pydantic"): "pydantic is imported",
    ("engine/attention/sdpa.py", "import flash_attn"): "flash_attn is imported",
    (
        "engine/core.py",
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import torch",
    ): "torch is imported",
    ("engine/core.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"): "torch is imported",
    # habits
    ("engine/core.py", "import os\nx = os.environ['A']"): "the environment is read",
    ("server/app.py", "from os import getenv"): "the environment is read",
    ("server/app.py", "def f():\n    print(1)"): "print",
    ("engine/core.py", "def f():\n    global x\n    x = 1"): "mutates: x",
    ("engine/core.py", "class LoggingMixin: pass"): "is a mixin",
    ("server/app.py", "class Mine(async_engine.AsyncEngine): pass"): "is a subclass of the engine",
    ("server/__init__.py", "x = 1"): "must be empty",
    # sizes
    ("engine/core.py", "\n" * 400): "file engine/core.py has",
    ("engine/core.py", f"async def f():\n{LONG_BODY}"): "function f has 61",
    ("engine/core.py", "class C:\n" + "\n".join("    x = 1" for _ in range(201))): "class C has 202",
    (
        "engine/core.py",
        "class C:\n    def __init__(self):\n" + "\n".join(f"        self.a{i}: int = 1" for i in range(26)),
    ): "assignments __init__ has 26",
}


@pytest.mark.parametrize(("planted", "complaint"), PLANTED.items(), ids=lambda value: str(value)[:60])
def test_a_planted_violation_is_found(tmp_path: Path, planted: tuple[str, str], complaint: str) -> None:
    _write(tmp_path, "engine/async_engine.py", "engine/runtime/worker.py", "engine/models/adapter.py", "server/app.py")
    path, text = planted
    _write(tmp_path, path, text=text)
    found = [line for check in CHECKS for line in check(architecture.sources(tmp_path))]
    assert len(found) == 1 and found[0].startswith(path) and complaint in found[0]


CLEAN = {
    "engine/core.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n    import server.app",
    "engine/runtime/worker.py": "import torch, engine.registry\nfrom engine.models import adapter",
    "engine/attention/flash.py": "def f():\n    import flash_attn",
    "engine/cluster/process.py": "import os\nos.environ['OMP_NUM_THREADS'] = '1'",
    "server/settings.py": "import os, pydantic_settings\nos.environ.get('x')",
    "server/routes/__init__.py": "from server.routes import chat\nROUTERS = [chat]",
    "server/routes/chat.py": "from engine.tokenizer.template import x\nimport fastapi, engine.async_engine, engine",
    "server/cli.py": "print(1)",
    "training/train.py": "import torch, engine.models.adapter\nprint(1)",
}


def test_what_the_rules_allow_is_left_alone(tmp_path: Path) -> None:
    for path, text in CLEAN.items():
        _write(tmp_path, path, text=text)
    assert [line for check in CHECKS for line in check(architecture.sources(tmp_path))] == []


def _write(root: Path, *paths: str, text: str = "") -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n", encoding="utf-8")
