"""Finds, builds, loads and checks the native library: once per process, and only in processes that compute."""

from __future__ import annotations

import logging
import platform
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from engine.kernels.build import (
    SOURCES,
    BuildError,
    Variant,
    cached_library,
    host_variants,
    is_intact,
    library_name,
)
from engine.kernels.native import Library, open_library
from engine.kernels.selfcheck import largest_errors

logger = logging.getLogger(__name__)

CACHE_DIR = Path("~/.cache/slipstream/kernels")
TOLERANCE = 1e-5  # of native kernels against their twins, on numbers around 1


@cache
def library() -> Library | None:
    """The kernels of this machine, or None: then their torch twins serve. A log line says which, and why."""
    return load(CACHE_DIR.expanduser())


def load(cache_dir: Path, prebuilt: Path = SOURCES) -> Library | None:
    """The first library that loads and computes what its twins do: prebuilt, from the cache, or built now."""
    variants = host_variants()
    if not variants:
        logger.warning("no native kernels for this CPU (%s); their torch twins serve, slower", platform.machine())
        return None
    reasons = []
    for variant in variants:
        try:
            for path in _candidates(variant, cache_dir, prebuilt):
                try:
                    return _checked(path)
                except (OSError, AttributeError, _Differs) as error:
                    reasons.append(f"{path.name}: {error}")
        except BuildError as error:
            reasons.append(str(error))
    logger.warning("no native kernels (%s); their torch twins serve, slower", "; ".join(dict.fromkeys(reasons)))
    return None


class _Differs(Exception):
    """A library computes something else than its twins."""


def _candidates(variant: Variant, cache_dir: Path, prebuilt: Path) -> Iterator[Path]:
    """Files to try, one after another, as long as none of them serves. Raises BuildError at the end of the list."""
    shipped = prebuilt / library_name(variant)
    if is_intact(shipped):
        yield shipped
    try:
        yield cached_library(variant, cache_dir)
        return
    except BuildError as error:
        logger.info("native kernels are not cached: %s", error)
    # A folder of our own, with a name that nobody can foresee: libraries in shared places are not to be trusted.
    with tempfile.TemporaryDirectory(prefix="slipstream-kernels-") as folder:
        yield cached_library(variant, Path(folder))


def _checked(path: Path) -> Library:
    """Load a library and compare each kernel with its twin. Raises OSError, AttributeError or _Differs."""
    found = open_library(path)
    for name, error in largest_errors(found).items():
        if not error <= TOLERANCE:
            raise _Differs(f"{name} differs from its twin by {error:.1e}")
    logger.info("native kernels: %s", path.name)
    return found
