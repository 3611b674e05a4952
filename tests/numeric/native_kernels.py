"""The native libraries that this machine can run, built afresh for the tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from engine.kernels.build import Variant, compile_library, find_compiler, host_variants, library_name
from engine.kernels.native import Library, open_library

# Without a compiler, or on another kind of CPU, there is no native code to test: the torch twins serve there.
VARIANTS = [variant.name for variant in host_variants()] if find_compiler() is not None else []
# Of those whose code differs where no matrix is multiplied: VNNI is for matrices alone.
VECTOR_VARIANTS = [name for name in VARIANTS if name != "avx512vnni"]


@cache
def build(name: str) -> Library:
    compiler = find_compiler()
    assert compiler is not None
    variant: Variant = next(variant for variant in host_variants() if variant.name == name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / library_name(variant)
        compile_library(compiler, variant, path)
        return open_library(path)
