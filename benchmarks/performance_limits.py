"""What the machine and our kernels allow, measured with nothing around them: run by `benchmarks.performance`.

    python -m benchmarks.performance_limits --config configs/ar.yaml --set models.0.quant=int8 --json out.json

The time of all matrix products of one pass, by tokens; bytes per second from memory, and the kernel's rate on a matrix
that stays in the cache, by number of threads. See `performance_products.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.cluster.process import prepare_threads
from engine.config import load
from engine.errors import SlipstreamError
from engine.hub.resolve import resolve


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.performance_limits")
    made.add_argument("--config", metavar="FILE", help="a YAML file as for `slipstream serve`")
    made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one value of it")
    made.add_argument("--seconds", type=float, default=1.0, help="of each figure (default: %(default)s)")
    made.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    made.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = made.parse_args(arguments)
    try:
        config = load(options.config, tuple(options.set)).engines()[0]
        prepare_threads(config)  # torch reads it when it is imported, so not a line earlier than that
        from benchmarks.performance_products import limits
        from engine.runtime.devices import prepare_torch
        from engine.runtime.loading import load_checked

        folder = resolve(config.model.path, options.cache_dir.expanduser())
        prepare_torch(config.parallel)
        found = limits(load_checked(config.model, folder, lambda _phase: None), options.seconds)
    except SlipstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    print(options.json.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
