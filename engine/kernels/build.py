"""Compiles this room's C code into one shared library; `python -m engine.kernels.build` does so for an image.

A library's name holds the hash of its sources and flags, and in a cache the compiler's too, so a stale one is never
found. Its last bytes are a checksum (the system's loader does not mind): a damaged or foreign file is never loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
COMPILERS = ("gcc", "cc", "clang")
SEAL = b"slipstream kernels "  # before the checksum
COMPILE_SECONDS = 120  # far more than it takes: a compiler that hangs must not hold up the start for good


class BuildError(RuntimeError):
    """No library could be built; the text says why."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set: what the compiler is told, and what the CPU must have (names of /proc/cpuinfo)."""

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]


_BASE, _FLAGS = ("avx2", "fma", "f16c"), ("-mfma", "-mf16c")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
VARIANTS = (  # the best first
    Variant(
        "avx512vnni",
        (*(f"-m{name}" for name in (*_AVX512, "avx512vnni")), *_FLAGS),
        frozenset((*_AVX512, "avx512_vnni", *_BASE)),
    ),
    Variant("avx512", (*(f"-m{name}" for name in _AVX512), *_FLAGS), frozenset((*_AVX512, *_BASE))),
    Variant("avx2", ("-mavx2", *_FLAGS), frozenset(_BASE)),
)


@dataclass(frozen=True, slots=True)
class Compiler:
    path: str
    version: str  # the first line of --version

    @property
    def threading(self) -> tuple[str, ...]:
        """Flags for OpenMP. Only gcc's runtime is the one that torch brings, so only gcc's code shares its threads."""
        return () if "clang" in self.version else ("-fopenmp",)


def host_variants(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[Variant, ...]:
    """The instruction sets of this machine that there is code for, the best first."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    features = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())
    return tuple(variant for variant in VARIANTS if variant.features <= features)


def find_compiler() -> Compiler | None:
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return Compiler(path, (done.stdout.splitlines() or [""])[0])
    return None


def library_name(variant: Variant, compiler: Compiler | None = None) -> str:
    """File name of a library: for an image, or with `compiler` for a cache that outlives compilers."""
    digest = hashlib.sha256(repr((FLAGS, variant.flags)).encode())
    for file in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    name = f"kernels-{variant.name}-{digest.hexdigest()[:16]}"
    if compiler is None:
        return f"{name}.so"
    return f"{name}-{hashlib.sha256(compiler.version.encode()).hexdigest()[:8]}.so"


def is_intact(library: Path) -> bool:
    """Whether a file is there and is, byte for byte, what `compile_library` wrote."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    body, seal, checksum = content.rpartition(SEAL)
    return bool(seal) and hashlib.sha256(body).digest() == checksum


def compile_library(compiler: Compiler, variant: Variant, target: Path) -> None:
    """Compile to `target`, which appears whole or not at all, however many processes do so. Raises BuildError."""
    target = target.absolute()
    # All files as one: the system's headers are parsed once, which is most of the time it takes.
    text = "".join(f'#include "{file.name}"\n' for file in sorted(SOURCES.glob("*.c")))
    options = [*FLAGS, *variant.flags, *compiler.threading, f"-I{SOURCES}"]
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as folder:
            out = Path(folder) / target.name
            command = [compiler.path, *options, "-o", str(out), "-x", "c", "-", "-lm"]
            done = subprocess.run(
                command,
                input=text,
                cwd=folder,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=COMPILE_SECONDS,
            )
            if done.returncode != 0:
                lines = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
                reason = next((line for line in lines if "error" in line), lines[0])
                raise BuildError(f"{compiler.path} failed: {reason[:300]}")
            body = out.read_bytes()
            with out.open("ab") as file:
                file.write(SEAL + hashlib.sha256(body).digest())
            os.replace(out, target)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler.path} took more than {COMPILE_SECONDS} seconds") from error
    except OSError as error:
        raise BuildError(f"{target} can't be written: {error.strerror or error}") from error


def cached_library(variant: Variant, cache: Path) -> Path:
    """The library in the `cache` folder, compiled if it is not there whole. Raises BuildError."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"there is no C compiler ({', '.join(COMPILERS)})")
    library = cache / library_name(variant, compiler)
    if not is_intact(library):
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"{cache} can't be made: {error.strerror or error}") from error
        compile_library(compiler, variant, library)
    return library


def main() -> int:
    """Compile every variant into a folder; in an image, the one where this file lies, where they are looked for."""
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.build", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=SOURCES, metavar="DIR", help="default: beside the sources")
    folder: Path = parser.parse_args().output
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compiler = find_compiler()
    if compiler is None:
        logger.error("there is no C compiler (%s)", ", ".join(COMPILERS))
        return 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for variant in VARIANTS:
            compile_library(compiler, variant, folder / library_name(variant))
            logger.info("built %s with %s", folder / library_name(variant), compiler.version)
    except (BuildError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
