"""What the HTTP process loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import architecture

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE_ENGINE = (
    *(f"engine.{name}" for name in ("types", "config", "errors", "protocols", "registry", "core", "async_engine")),
    *("engine.speculation", "engine.verification"),
    *("engine.validate", "engine.scheduling.", "engine.cluster.", "engine.front.", "engine.tokenizer.", "engine.hub."),
)


def test_the_front_half_imports_neither_torch_nor_transformers() -> None:
    """Everything the HTTP process loads, and the torch-free half of the engine, in one fresh interpreter."""
    files = (file.relative_to(ROOT) for package in architecture.PACKAGES for file in (ROOT / package).rglob("*.py"))
    names = sorted(".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files)
    modules = [name for name in names if architecture.within(name, ("server.", *TORCH_FREE_ENGINE))]
    assert {"server.app", "server.cli", "engine.async_engine"} <= set(modules)
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
