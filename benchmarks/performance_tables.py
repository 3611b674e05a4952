"""The tables of docs/performance.md, as rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import report
from benchmarks.performance_contenders import BY_NAME, EIGHT, MANY, QUESTIONS, SINGLE, Contender
from benchmarks.performance_figures import (
    FIGURES,
    Figure,
    Peak,
    Servers,
    Step,
    Steps,
    best_peer,
    limit,
    served_step_ms,
    share_of_limit,
)
from benchmarks.performance_targets import Outcome

Rows = list[list[str]]
CASES = (("decode", 1), ("decode", 32), ("verify", 1), ("prefill", 1))
PARTS_FIRST = ("gemm", "attention")


def target_rows(outcomes: Sequence[Outcome]) -> Rows:
    rows = [["number to reach", "at least", "found", "compared with", "tokens per round", ""]]
    for one in outcomes:
        found = "-" if one.found is None else f"{one.found:.2f}"
        tokens = "" if one.tokens is None else f"{one.tokens:.2f}"
        verdict = one.verdict if one.verdict != "missed" else "**missed**"
        rows.append([one.target.title, f"{one.target.at_least:g}", found, one.beside, tokens, verdict])
    return rows


def server_rows(found: Servers) -> Rows:
    """Everybody: medians (ranges) over the rounds."""
    rows = [["", *(figure.title for figure in FIGURES), "ready, s", "memory, MB", "load beside, cores"]]
    for one in found.present():
        cells = [report.spread(list(found.values(one.name, figure).values())) for figure in FIGURES]
        side = found.sides[one.name]
        tail = [report.show(side.ready_seconds), f"{side.memory / 1e6:,.0f}", f"{found.load(one.name):.2f}"]
        rows.append([_titled(one, side.version), *cells, *tail])
    return rows


def _titled(one: Contender, version: str) -> str:
    return f"**{one.title}**" if one.kind == "ours" else f"{one.title} ({version})"


def comparison_rows(found: Servers, steps: Steps | None) -> Rows:
    """Ours, figure by figure, beside the best peer and the limit."""
    rows = [
        ["figure", "ours", "", "best server", "ratio", "best library", "ratio", "limit", "of it", "tokens per round"]
    ]
    for figure in FIGURES:
        for one in found.present():
            if one.kind == "ours":
                rows.append(_comparison(found, steps, figure, one))
    return rows


def _comparison(found: Servers, steps: Steps | None, figure: Figure, one: Contender) -> list[str]:
    values = list(found.values(one.name, figure).values())
    cells = []
    for kind in ("server", "library"):
        best = best_peer(found, one.name, figure, (kind,))
        cells += (
            ["-", "-"] if best is None else [f"{best.name}: {report.show(best.median)}", report.spread(best.ratios)]
        )
    drafted = found.drafting(one.name, figure.scenario)
    limits = steps.limits.get(one.quant) if steps else None
    if limits is None or not values or one.drafts or figure.key == "second_ms":
        shown = ["", ""]  # of drafts there is none: it moves with what they guess
    else:
        most = limit(limits, figure, found.new_tokens)
        shown = [report.show(most), f"{share_of_limit(statistics.median(values), most, figure):.2f}"]
    tokens = "" if drafted is None else f"{drafted:.2f}"
    return [figure.title, one.title, report.spread(values), *cells, *shown, tokens]


def limit_rows(steps: Steps) -> Rows:
    """What the machine and the kernels allow, by format."""
    rows = [["", "weights, MB", "products alone at 1, ms", "at 8", "at 32", "at 512", "bytes alone, ms"]]
    rows[0] += ["kernel, 1 thread, Gop/s", "all threads", "of the peak"]
    read = max((peak.read for peak in steps.peaks.values()), default=0.0)
    for quant, one in steps.limits.items():
        products = [f"{one.gemm_ms[count]:.2f}" for count in ("1", "8", "32", "512")]
        bytes_ms = f"{1e3 * one.weight_bytes / read:.2f}" if read else "-"
        rates = list(one.rates.items())
        shown = [f"{rate / 1e9:,.0f}" for _, rate in (rates[0], rates[-1])]
        peaks = [steps.peaks[count] for count, _ in rates if count in steps.peaks]
        peak = 0.0 if not peaks else peaks[-1].floats if quant == "fp16" else peaks[-1].bytes
        share = f"{rates[-1][1] / peak:.2f}" if peak else "-"
        rows.append([quant, f"{one.weight_bytes / 1e6:.0f}", *products, bytes_ms, *shown, share])
    return rows


def machine_rows(peaks: Mapping[str, Peak]) -> Rows:
    rows = [["threads", "read from memory, GB/s", "fp32, Gop/s", "int8, Gop/s"]]
    for count, peak in peaks.items():
        rows.append([count, f"{peak.read / 1e9:.1f}", f"{peak.floats / 1e9:,.0f}", f"{peak.bytes / 1e9:,.0f}"])
    return rows


def kernel_rows(steps: Steps) -> Rows:
    """Where a step's time goes: decode of 1 and 32, a verified block of 8, a prompt of 512."""
    shown = [(quant, step) for quant, run in steps.runs.items() for step in chosen(run.cases)]
    names = list(dict.fromkeys([*PARTS_FIRST, *(part for _, step in shown for part in step.parts_ms)]))
    rows = [["format", "step", "ms", *names, "products and attention", "floor, ms", "x floor"]]
    for quant, step in shown:
        shares = {part: step.share(part) for part in names}
        parts = [_part(step.ms, share) for share in shares.values()]
        floor = sum(step.floors_ms.values())
        both = f"{100 * step.share(*PARTS_FIRST):.0f} %"
        rows.append([quant, step.name, f"{step.ms:.2f}", *parts, both, f"{floor:.2f}", f"{step.ms / floor:.2f}"])
    return rows


def _part(ms: float, share: float) -> str:
    percent = f" ({100 * share:.0f} %)" if share >= 0.005 else ""
    return f"{ms * share:.2f}{percent}" if share else ""


def chosen(cases: Sequence[Step]) -> list[Step]:
    """Those of the report, in its order."""
    return [one for kind, batch in CASES for one in cases if (one.case.kind, one.case.batch) == (kind, batch)]


_STEP_OF = {SINGLE: ("decode", 1), QUESTIONS: ("decode", 1), EIGHT: ("decode", 8), MANY: ("decode", 32)}


def missed_lines(outcomes: Sequence[Outcome], servers: Servers | None, steps: Steps | None) -> list[str]:
    """Where the time goes of each number that was missed."""
    return [_profile(one, servers, steps) for one in outcomes if one.verdict == "missed"]


def _profile(one: Outcome, servers: Servers | None, steps: Steps | None) -> str:
    contender, scenario = BY_NAME[one.target.ours], one.target.scenario
    kind, batch = ("verify", 1) if contender.drafts else _STEP_OF.get(scenario, ("prefill", 1))
    run = steps.runs.get(contender.quant) if steps else None
    limits = steps.limits.get(contender.quant) if steps else None
    step = run.case(kind, batch) if run else None
    told = [f"- {one.target.title}: {one.found:.2f} of {one.target.at_least:g}."]
    if step is not None:
        parts = sorted(step.parts_ms, key=step.share, reverse=True)
        shares = ", ".join(f"{part} {step.ms * step.share(part):.2f}" for part in parts if step.share(part) > 0.01)
        told.append(f"A step ({step.name}) takes {step.ms:.2f} ms: {shares}.")
    alone = limits.gemm_ms.get(str(step.case.batch * step.case.query)) if limits and step else None
    if alone is not None:
        told.append(f"Its products alone take {alone:.2f} ms.")
    served = served_step_ms(servers, contender.name, scenario) if servers else None
    if served is not None:
        told.append(f"From token to token, as a client sees it: {served:.2f} ms.")
    return " ".join(told)


def left_out_lines(found: Servers) -> list[str]:
    return [f"- {name}: {reason}" for name, reason in found.left_out.items()]
