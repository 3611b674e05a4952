"""What each weight format costs in quality, beside fp32: `python -m benchmarks.quality --json out.json`.

A fixed text is read by the model in torch's own fp32 and in every format, side by side: perplexity, the divergence of
the laws (KL, in nats), how often the most likely token is the same. Then greedy answers of 64 tokens, beside those of
fp32: how many are equal, and where they part. A run that was cut goes on where it ended: formats that the file has
already, on the same text, are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from benchmarks import report
from benchmarks.quality_tables import quality_rows
from benchmarks.quality_texts import Texts, fixed_texts
from engine.cluster.process import prepare_threads
from engine.config import EngineConfig, KVConfig, load
from engine.errors import SlipstreamError
from engine.hub.resolve import resolve
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import SamplingParams

if TYPE_CHECKING:
    from benchmarks.quality_measures import Reader

LENGTH = 512  # of a window
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Variant:
    """Weights and keys and values in these formats."""

    quant: str
    kv: str

    @property
    def name(self) -> str:
        return f"{self.quant}, KV {self.kv}"


REFERENCE = Variant("none", "fp32")
VARIANTS = tuple(Variant(quant, kv) for kv in ("fp32", "fp16") for quant in ("none", "fp16", "int8", "int4"))


@dataclass(frozen=True, slots=True)
class Effort:
    per_source: int  # tokens of each text
    prompts: int
    tokens: int  # of each answer


def measure(options: argparse.Namespace, folder: Path, effort: Effort) -> dict[str, object]:
    """Every variant that the file does not have yet, written down one by one."""
    texts = fixed_texts(Tokenizer.load(folder), effort.per_source, LENGTH, effort.prompts)
    for line in texts.missing:
        say(f"note: {line}")
    rows: dict[str, Row] = known(options.json, texts.digest)
    record = _record(texts, effort, rows)
    wanted = [v for v in VARIANTS if v.quant in options.quants and v != REFERENCE and v.name not in rows]
    if not wanted:
        return record
    (reference,), expected = _readers(folder, [REFERENCE]), _answers(folder, REFERENCE, texts, effort)
    for quant in dict.fromkeys(variant.quant for variant in wanted):
        began, alike = time.monotonic(), [variant for variant in wanted if variant.quant == quant]
        try:
            rows.update(_measured(folder, alike, reference, expected, texts, effort))
        except SlipstreamError as error:
            say(f"{quant}: left out: {error}")
            continue
        say(f"{', '.join(variant.name for variant in alike)}: {time.monotonic() - began:.0f} s")
        record = _record(texts, effort, rows)
        if options.json:
            write(options.json, record)
    return record


def _measured(
    folder: Path,
    variants: Sequence[Variant],
    reference: Reader,
    expected: list[tuple[int, ...]],
    texts: Texts,
    effort: Effort,
) -> dict[str, Row]:
    """Variants of the same weights: the model is loaded once for all of them, and the reference reads once."""
    from benchmarks.quality_measures import parting, read

    readers = _readers(folder, variants)
    readings = read(reference, readers, texts.windows)
    del readers
    gc.collect()
    found: dict[str, Row] = {}
    for variant, reading in zip(variants, readings, strict=True):
        found[variant.name] = {
            **reading[""].figures(),
            "by_source": {name: part.figures() for name, part in reading.items() if name},
            "answers": parting(expected, _answers(folder, variant, texts, effort)),
        }
    return found


def _config(folder: Path, variant: Variant) -> EngineConfig:
    overrides = [f"models.0.path={folder}", f"models.0.quant={variant.quant}", "kv.memory=512MiB"]
    return load(None, (*overrides, *([f"kv.dtype={variant.kv}"] if "dtype" in KVConfig.__slots__ else []))).engines()[0]


def _readers(folder: Path, variants: Sequence[Variant]) -> list[Reader]:
    """The model loaded and checked as a server does it, over a pool for each of these."""
    import torch

    from benchmarks.quality_measures import Reader
    from engine.runtime.loading import load_checked

    loaded = load_checked(_config(folder, variants[0]).model, folder, lambda _phase: None)
    dtypes = (torch.float16 if variant.kv == "fp16" else torch.float32 for variant in variants)
    return [Reader(loaded, LENGTH, dtype) for dtype in dtypes]


def _answers(folder: Path, variant: Variant, texts: Texts, effort: Effort) -> list[tuple[int, ...]]:
    """Greedy, all together, through the whole engine."""
    from engine.llm import LLM

    params = SamplingParams(max_tokens=effort.tokens, temperature=0.0, ignore_eos=True)
    with LLM(config=_config(folder, variant)) as llm:
        return [answer.token_ids for answer in llm.generate(texts.prompts, params)]


def _record(texts: Texts, effort: Effort, rows: Mapping[str, Row]) -> dict[str, object]:
    return {
        "digest": texts.digest,
        "sources": texts.sources,
        "missing": texts.missing,
        "positions": sum(len(window.ids) - 1 for window in texts.windows),
        "prompts": len(texts.prompts),
        "tokens": effort.tokens,
        "rows": dict(rows),
    }


def known(file: Path | None, digest: str) -> dict[str, Row]:
    """The rows of an earlier run on the same text; none where there is no such run."""
    if file is None or not file.exists():
        return {}
    found = msgspec.json.decode(file.read_bytes(), type=dict[str, object])
    rows = found.get("rows")
    return dict(rows) if found.get("digest") == digest and isinstance(rows, dict) else {}


def write(file: Path, record: Mapping[str, object]) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--model", default="demo", help="default: %(default)s")
    made.add_argument("--quants", type=_names, default=("none", "fp16", "int8", "int4"), metavar="NAME,NAME")
    made.add_argument("--quick", action="store_true", help="little text, few answers: for a look")
    made.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    made.add_argument("--json", type=Path, metavar="FILE", help="where to write, and what to go on with")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    effort = Effort(512, 8, 16) if options.quick else Effort(1536, 32, 64)
    prepare_threads(EngineConfig())  # torch reads it when it is imported
    try:
        folder = resolve(options.model, options.cache_dir.expanduser(), say)
        record = measure(options, folder, effort)
    except SlipstreamError as error:
        say(f"error: {error}")
        return 1
    if options.json:
        write(options.json, record)
    rows = record["rows"]
    assert isinstance(rows, dict)
    print(report.table(quality_rows(rows)))
    return 0


def _names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= {variant.quant for variant in VARIANTS}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of none, fp16, int8, int4")
    return chosen


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
