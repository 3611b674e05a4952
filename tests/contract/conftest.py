"""The demo model, converted once per machine into the ordinary cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.hub.resolve import resolve


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return resolve("demo", Path.home() / ".cache" / "slipstream")
