"""The version of the installed package."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """As in pyproject.toml; "0+source" in a source tree that is not installed."""
    try:
        return metadata.version("slipstream")
    except metadata.PackageNotFoundError:
        return "0+source"
