"""How the native library comes about: built once, found again, never trusted blindly, and never missed."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.kernels import build, library, native
from engine.kernels.build import (
    BuildError,
    cached_library,
    compile_library,
    find_compiler,
    host_variants,
    is_intact,
    library_name,
)
from engine.kernels.selfcheck import largest_errors

HERE = host_variants()[:1] if find_compiler() is not None else ()
variants = pytest.mark.parametrize("variant", HERE, ids=lambda variant: variant.name)


def works(found: native.Library | None) -> bool:
    assert found is not None
    x = torch.tensor([[3.0, 4.0]])
    normed, _ = native.add_rms_norm(found, x, None, torch.ones(2), 0.0)
    return bool(torch.allclose(normed, x / 12.5**0.5))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@variants
def test_built_once_and_found_again(variant: build.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(library.load(tmp_path / "cache", tmp_path))
    compiler = find_compiler()
    assert compiler is not None and names(tmp_path / "cache") == [library_name(variant, compiler)]

    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build, "compile_library", never)
    assert works(library.load(tmp_path / "cache", tmp_path))


@variants
def test_damaged_file_is_built_again(variant: build.Variant, tmp_path: Path) -> None:
    path = cached_library(variant, tmp_path)
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (
        content[:middle],
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        content[: content.index(build.SEAL)],  # as any compiler leaves it: not ours
        b"",
        b"no library\n" + build.SEAL,
    ):
        path.write_bytes(damaged)
        assert not is_intact(path)
    assert works(library.load(tmp_path, tmp_path / "none"))
    assert is_intact(path) and names(tmp_path) == [path.name]


@variants
def test_two_processes_at_once(variant: build.Variant, tmp_path: Path) -> None:
    """Whoever comes first, both end up with a whole library, and nothing else is left lying about."""
    code = """
import sys
from pathlib import Path
from engine.kernels import build
sys.stdin.readline()
variant = next(variant for variant in build.host_variants() if variant.name == sys.argv[2])
assert build.is_intact(build.cached_library(variant, Path(sys.argv[1])))
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path), variant.name]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:  # both wait for this line when they are ready to build
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(names(tmp_path)) == 1 and works(library.load(tmp_path, tmp_path / "none"))


@variants
def test_cache_that_cannot_be_written(variant: build.Variant, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("no folder")
    with caplog.at_level(logging.INFO):
        assert works(library.load(blocker / "cache", tmp_path))
    assert "can't be made" in caplog.text and blocker.read_text() == "no folder"


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library.load(tmp_path / "cache", tmp_path) is None
    assert "there is no C compiler" in caplog.text or "no native kernels for this CPU" in caplog.text
    assert "twins serve" in caplog.text and caplog.text.count("there is no C compiler") <= 1


@variants
def test_shipped_library_needs_no_compiler(
    variant: build.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m engine.kernels.build --output DIR` leaves it in an image; a stale or damaged one is passed over."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.kernels.build", "--output", "shipped"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(build.__file__).parents[2]), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shipped = tmp_path / "shipped"
    assert names(shipped) == sorted(library_name(each) for each in build.VARIANTS)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert works(library.load(tmp_path / "cache", shipped))
        assert not (tmp_path / "cache").exists()
    found = library.load(tmp_path / "cache", shipped)
    assert found is not None and found.path.parent == shipped
    for file in list(shipped.iterdir()):
        content = file.read_bytes()
        file.unlink()  # a new file: the one that is loaded must not change
        file.write_bytes(content[:-1])
    found = library.load(tmp_path / "cache", shipped)
    assert works(found) and found is not None and found.path.parent == tmp_path / "cache"


def copy_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of our own to spoil."""
    folder.mkdir()
    for pattern in ("*.c", "*.h"):
        for file in build.SOURCES.glob(pattern):
            shutil.copy(file, folder)
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


BREAKS = {  # kernel -> file, what stands there, and what is wrong in its place
    "add_rms_norm": ("norms.h", "v_add(v_load(residual + i)", "v_sub(v_load(residual + i)"),
    "gated_activation": ("activations.h", "v_set(0.044715f)", "v_set(0.144715f)"),
    "rope": ("rope.c", "a->kv_heads * a->value_dim", "a->value_dim"),
    "attention": ("attention.h", "position - p->window + 1", "position - p->window"),
    "matrix": ("gemm_prepare.c", "scale = largest / 127.0f", "scale = largest / 120.0f"),
    "choice": ("choose.c", "a->second[row] = peak.second", "a->second[row] = peak.best"),
    "certainty": ("certainty.c", "p = p * f + 0.5;", "p = p * f + 0.6;"),
}


@variants
def test_library_that_computes_wrongly_is_not_used(
    variant: build.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = copy_sources(tmp_path / "sources", monkeypatch)
    monkeypatch.setattr(library, "host_variants", lambda: (variant,))
    for file, code, wrong in BREAKS.values():
        text = (sources / file).read_text()
        assert code in text
        (sources / file).write_text(text.replace(code, wrong))
    assert library.load(tmp_path / "cache", tmp_path) is None
    assert "differs from its twin" in caplog.text and "twins serve" in caplog.text
    errors = largest_errors(native.open_library(cached_library(variant, tmp_path / "cache")))
    assert errors.keys() == BREAKS.keys() and min(errors.values()) > 10 * library.TOLERANCE


@variants
def test_sources_that_do_not_compile(
    variant: build.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = copy_sources(tmp_path / "sources", monkeypatch)
    (sources / "norms.c").write_text("this is no C\n")
    with pytest.raises(BuildError, match=r"failed: .*norms\.c.*error"):
        cached_library(variant, tmp_path / "cache")
    assert library.load(tmp_path / "cache", tmp_path) is None
    assert "failed:" in caplog.text and names(tmp_path / "cache") == []


@variants
def test_name_follows_sources_flags_and_compiler(variant: build.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler()
    assert compiler is not None
    seen = {library_name(variant), library_name(variant, compiler)}
    seen.add(library_name(variant, build.Compiler(compiler.path, "gcc 99")))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    seen.add(library_name(variant))
    assert len(seen) == 4


@variants
def test_hanging_compiler_is_given_up(variant: build.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.2)
    with pytest.raises(BuildError, match="took more than"):
        compile_library(build.Compiler(str(script), "slow"), variant, tmp_path / "x.so")


def test_instruction_sets_are_read_from_the_machine(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert host_variants(info) == ()
    for flags, expected in {
        "fpu sse2 avx": [],
        "fpu avx2 fma": [],
        "fpu avx2 fma f16c": ["avx2"],
        "avx2 avx512f": [],
        "avx2 fma f16c avx512f avx512bw avx512dq avx512vl": ["avx512", "avx2"],
        "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni": ["avx512vnni", "avx512", "avx2"],
    }.items():
        info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
        assert [variant.name for variant in host_variants(info)] == expected
    info.write_text("processor : 0\nFeatures : fp asimd\n")
    assert host_variants(info) == ()


def test_clang_builds_without_threads() -> None:
    """Its OpenMP runtime would bring a second pool of threads beside torch's."""
    assert build.Compiler("/usr/bin/cc", "Debian clang version 14.0.6").threading == ()
    assert build.Compiler("/usr/bin/cc", "cc (Debian 12.2.0-14) 12.2.0").threading == ("-fopenmp",)
