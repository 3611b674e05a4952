"""Compile Triton's glue to the CUDA driver into a cache folder, at a time when there is a compiler but no driver.

Triton compiles one small C file at the first launch of any kernel and keeps it in its cache, under a key that depends
on that file and the platform alone. The final image has no compiler, so it brings the file along. Run it in the image's
environment:

    TRITON_CACHE_DIR=FOLDER python triton_glue.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton


def main() -> int:
    """Fill TRITON_CACHE_DIR. Exit status 1 when nothing came out."""
    source = Path(triton.__file__).parent / "backends/nvidia/driver.c"
    with tempfile.TemporaryDirectory() as stub:
        _stand_in_driver(source.read_text(encoding="utf-8"), Path(stub))
        environment = {**os.environ, "TRITON_LIBCUDA_PATH": stub, "LD_LIBRARY_PATH": stub}
        code = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    found = sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.so"))
    sys.stdout.writelines(f"{file}\n" for file in found)
    return 0 if found else 1


def _stand_in_driver(source: str, folder: Path) -> None:
    """A libcuda.so.1 with every function that `source` could ask for, so that its result links and loads."""
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", source)))
    stub = folder / "stub.c"
    stub.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names), encoding="utf-8")
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, stub], check=True)


if __name__ == "__main__":
    sys.exit(main())
