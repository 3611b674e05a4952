"""`python -m benchmarks.grammars`: libraries for structured output beside each other, on speed, coverage and safety.

Schemas are those of `grammar_schemas.py`, keywords of `grammar_keywords.py`, attacks of `grammar_hostile.py`. Libraries
that are not installed are left out. Every judgement on an answer is the jsonschema package's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jsonschema

from benchmarks import report
from benchmarks.grammar_child import LIBRARIES
from benchmarks.grammar_hostile import HOSTILE
from benchmarks.grammar_keywords import KEYWORDS
from benchmarks.grammar_runs import Found, Runner, numbers
from benchmarks.grammar_schemas import Schemas

SEED, STEPS, SECONDS, HOSTILE_SECONDS, HOSTILE_STEPS = 11, 300, 30.0, 10.0, 32
SLOW_COUNT = 10  # schemas for a library that takes seconds for one
STALL, LARGE = 1.0, 256.0  # seconds of one call, MiB of one grammar, that would hurt a server


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.grammars", description=__doc__)
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    options = parser.parse_args(arguments)
    source = Schemas(SEED)
    schemas = [source.one() for _ in range(options.schemas)]
    results: dict[str, Found] = {}
    for name in options.libraries:
        runner = Runner(name)
        if not runner.available():
            print(f"{name} is not installed: left out")
            continue
        try:
            count = SLOW_COUNT if name == "outlines_core" else len(schemas)
            found = followed(runner, schemas[:count])
            results[name] = {"version": installed(name), **found, **keywords(runner), **safety(runner)}
        finally:
            runner.close()
        print(f"{name}: {json.dumps({key: value for key, value in results[name].items() if key not in DETAILS})}")
        if options.out is not None:  # after each: they take minutes
            record = {"machine": report.machine(), "commit": report.git_commit(), "seed": SEED, "libraries": results}
            options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(report.table(rows(results)))
    return 0


DETAILS = ("keywords", "hostile", "invalid_examples")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def followed(runner: Runner, schemas: Sequence[dict[str, object]]) -> Found:
    """Compile and follow random schemas: how fast, how many, and whether what came out is right."""
    outcomes: Counter[str] = Counter()
    compiles: list[float] = []
    masks: list[float] = []
    examples: list[object] = []
    for number, schema in enumerate(schemas):
        found = runner.run("json", json.dumps(schema), steps=STEPS, seed=number, seconds=SECONDS)
        for reason in ("failure", "refused", "stuck"):
            if reason in found:
                outcomes[str(found[reason]) if reason == "failure" else reason] += 1
                break
        else:
            compiles.append(float(str(found["compile"])))
            masks += numbers(found, "masks")
            outcome = judged(schema, str(found["text"])) if found["ended"] else "unfinished"
            outcomes[outcome] += 1
            if outcome == "invalid" and len(examples) < 5:
                examples.append({"schema": schema, "answer": found["text"]})
    return {
        "schemas": len(schemas),
        "outcomes": dict(outcomes),
        "compile_ms": spread([seconds * 1e3 for seconds in compiles]),
        "mask_us": spread([seconds * 1e6 for seconds in masks]),
        "invalid_examples": examples,
    }


def judged(schema: dict[str, object], text: str) -> str:
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    return "valid"


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 3),
        "p99": round(report.percentile(values, 99), 3),
        "worst": round(max(values), 3),
    }


def keywords(runner: Runner) -> Found:
    """What a library does with each keyword: enforces it, refuses it, is too strict, or ignores it in silence."""
    table: dict[str, str] = {}
    for keyword in KEYWORDS:
        good, bad = (json.dumps(one, ensure_ascii=False) for one in (keyword.good, keyword.bad))
        schema = keyword.schema
        assert jsonschema.Draft202012Validator(schema).is_valid(keyword.good), keyword.name
        checks = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        assert "format" in schema or not checks.is_valid(keyword.bad), keyword.name
        found = runner.run("json", json.dumps(schema), steps=8, seconds=SECONDS, accept=(good, bad))
        if "failure" in found or "refused" in found:
            table[keyword.name] = "refused" if "refused" in found else str(found["failure"])
            continue
        accepted = found["accepted"]
        assert isinstance(accepted, list)
        takes_good, takes_bad = accepted
        table[keyword.name] = "ignored" if takes_bad else "enforced" if takes_good else "too strict"
    return {"keyword_counts": dict(Counter(table.values())), "keywords": table}


def safety(runner: Runner) -> Found:
    """What attacks do to it, without the bounds that a server puts before it."""
    counts: Counter[str] = Counter()
    details: dict[str, Found] = {}
    for case in HOSTILE:
        found = runner.run(case.kind, case.text, steps=HOSTILE_STEPS, seconds=HOSTILE_SECONDS)
        slowest = max([float(str(found.get("compile", 0))), *numbers(found, "masks")])
        memory = float(str(found.get("mib", 0)))
        if "failure" in found:
            outcome = str(found["failure"])
        elif slowest > STALL or memory > LARGE:
            outcome = "slow" if slowest > STALL else "large"
        else:
            outcome = "refused" if "refused" in found or "stuck" in found else "followed"
        counts[outcome] += 1
        details[case.name] = {"outcome": outcome, "slowest_s": round(slowest, 3), "mib": round(memory, 1)}
    return {"hostile_counts": dict(counts), "hostile": details}


def rows(results: dict[str, Found]) -> list[list[str]]:
    table = [["", *results]]
    for key in ("version", "outcomes", "compile_ms", "mask_us", "keyword_counts", "hostile_counts"):
        table.append([key, *(json.dumps(found[key]).strip('"') for found in results.values())])
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
