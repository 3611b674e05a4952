"""What every test shares: no network, two sizes of every large count, and the time budgets."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.budget"]

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Before torch is imported: on a busy machine, threads that spin at a barrier starve the ones they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Derandomized: a red run is red again when it is run again. `--full` looks further, with the same functions.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("full", deadline=None, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="large counts, and the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if config.getoption("full") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine or this run is not for; the closing line counts it as deselected."""
    left_out = set() if config.getoption("full") else {"slow"}
    if not Path("/dev/nvidiactl").exists():
        left_out.add("gpu")
    if not (Path("/usr/bin/chromium").exists() and Path("/usr/bin/chromedriver").exists()):
        left_out.add("browser")  # `.ci/run` installs both
    chosen = [item for item in items if not any(item.get_closest_marker(mark) for mark in left_out)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    items.sort(key=lambda item: "unit" not in item.path.parts)  # the fast ones first; the order stays otherwise


def pytest_collection_finish() -> None:
    """Imported libraries are for good: the collector need not walk their half a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True under `--full`: for tests whose count of cases has a light and a large size."""
    return bool(request.config.getoption("full"))
