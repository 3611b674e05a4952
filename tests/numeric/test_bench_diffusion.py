"""`slipstream bench diffusion` on tiny random models: all parts run to their end, and say what they found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import diffusion_products
from benchmarks.diffusion_engine import Served, answers
from benchmarks.diffusion_samples import Kept
from benchmarks.diffusion_variants import Variant, variants, wish
from benchmarks.drafts_engine import Load
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_task import Group, Question
from engine.diffusion import DiffusionParams
from server import cli
from tests.tiny_diffusion import WIDTH, save_tiny_diffusion

FEW = (
    *("--cases", "4", "--tokens", "8", "--timed", "1", "--clients", "2", "--batch", "1,2"),
    *("--caches", "none,dual"),
)
CASES = tuple(Question(f"q{i}", f"{i} abc" * (1 + i), lambda text: len(text) % 2) for i in range(4))


@pytest.fixture(scope="module", autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1" if name == "OMP_NUM_THREADS" else "PASSIVE")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_diffusion("a2d_llama_full", tmp_path_factory.mktemp("bench") / "full")


@pytest.fixture(scope="module")
def block(full: Path) -> Path:
    return save_tiny_diffusion("a2d_llama_block", full.parent / "block")


@pytest.fixture(scope="module")
def served(full: Path) -> Served:
    return Served(full, Load("none", "1MiB", 1))


def bench(model: Path, folder: Path, *more: str) -> tuple[str, Any]:
    """The Markdown page and the record."""
    lines = [json.dumps({"prompt": f"{i} abc", "reference": str(i)}) for i in range(40)]  # every fifth is asked
    (folder / "asked.jsonl").write_text("\n".join(lines))
    files = {kind: folder / f"x.{kind}" for kind in ("json", "markdown")}
    flags = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    words = [str(model), "--task", str(folder / "asked.jsonl"), "--quant", "none", "--memory", "1MiB", "--threads", "1"]
    assert cli.main(["bench", "diffusion", *words, *more, *flags]) == 0
    text = files["json"].read_text()
    assert str(folder.parent) not in text + files["markdown"].read_text(), "no paths of this machine"
    return files["markdown"].read_text(), json.loads(text)


def test_all_parts(full: Path, block: Path, tmp_path: Path) -> None:
    page, record = bench(full, tmp_path, "--drafter", str(block), "--quick", *FEW)
    assert record["command"].startswith("slipstream bench diffusion full --task asked.jsonl") and record["machine"]
    found = record["found"]
    whole, sure, unsure = found["rules"]["parts"]
    assert whole["cases"] == sure["cases"] + unsure["cases"] == 4 and unsure["confidence"][0] <= sure["confidence"][1]
    rows = {row["variant"]: row for row in whole["rows"]}
    assert rows["threshold 0.9"]["less"]["value"] == 0 and rows["threshold 0.9"]["times"]["value"] == 1
    assert rows["quota 4"]["forwards"]["value"] == rows["quota 1"]["forwards"]["value"] / 4 == 2
    assert whole["matches"] and all(one["more"] == 0 for one in whole["matches"]) and whole["best"]["threshold"]
    assert all(sum(one["counts"]) > 0 for one in found["rules"]["histograms"])
    caches = {(row["cache"], row["variant"]) for row in found["caches"]["rows"]}
    assert len(caches) == 2 * 2 + 1 and ("none", "quota 1") in caches
    loads = {(one["batch"], one["cache"], one["variant"]) for one in found["speed"]["speeds"]}
    assert len(loads) == 2 * 2 * 2 + 1 and (1, "none", "quota 1") in loads
    assert all(one["equal"] == one["requests"] and one["products"][0] > 0 for one in found["batch"])
    for one in found["batch"]:
        assert len(one["parts"]) == 4 and min(one["parts"].values()) > 0, one["parts"]
    points = {(one["series"], one["variant"]): one for one in found["dual"]["points"]}
    assert found["dual"]["drafter"] == "block" and found["dual"]["draft_parameters"] == found["dual"]["parameters"] > 0
    mixed = points["verify confidence 0.5", "frechet -2, 4 steps"]
    assert mixed["verifies"] > 0 and mixed["cost"]["value"] > points["drafter alone", "quota 1"]["cost"]["value"] / 9
    assert "DualDiffusion" in page and "requests at once" in page


def test_a_block_causal_model(block: Path, tmp_path: Path) -> None:
    words = ("--parts", "rules", "--rules", "threshold=.9,.3", *FEW)
    _, record = bench(block, tmp_path, *words)
    (part,) = record["found"]["rules"]["parts"]
    assert {row["cache"] for row in part["rows"]} == {"block"} and part["confidence"] is None, (
        "no halves without quota 1"
    )
    png = tmp_path / "x.png"
    assert cli.main(["bench", "diffusion", "--draw", str(tmp_path / "x.json"), "--png", str(png)]) == 0
    assert png.read_bytes()[:4] == b"\x89PNG" and len(png.read_bytes()) > 10_000


def variant(served: Served, word: str, cache: str) -> Variant:
    return variants([wish(word)], served.diffusion, 16, DiffusionParams(cache=cache, block_length=8))[0]


def test_forwards_and_positions_are_those_of_the_sampler(served: Served) -> None:
    """One token a step takes as many passes as the canvas has places; a pass feeds what its cache leaves to feed."""
    asked, single = served.asked(Group("g", CASES, chat=False), 16), 0
    for cache, rows in (("none", lambda p: 16 * (p + 16)), ("dual", lambda p: 2 * (p + 16) + 14 * 8)):
        for case, one in enumerate(answers(served, asked, variant(served, "quota=1", cache), 3).samples):
            prompt = len(served.tokenizer.encode(CASES[case].text))
            if one.tokens == 16:  # others ended earlier
                single += 1
                assert (one.forwards, one.positions, one.draft_positions) == (16, rows(prompt), 0)
    assert single


def test_confidences_are_those_that_the_rule_was_shown(served: Served) -> None:
    asked = served.asked(Group("g", CASES[:1], chat=False), 8)
    found = answers(served, asked, variant(served, "quota=1", "none"), 1)
    (one,) = found.samples
    assert found.histogram is not None and found.histogram.total == sum(range(9 - one.forwards, 9))
    assert 0 < one.confidence <= 1


def test_answers_are_kept(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not measured again; another setting, or another case, is."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    served = Served(full, Load("none", "1MiB", 1), kept=Kept([first]))
    asked, wanted = served.asked(Group("g", CASES, chat=False), 8), variant(served, "quota=2", "dual")
    found = answers(served, asked, wanted, 2)
    first.write_bytes(first.read_bytes() + b'{"key": "cut o')
    served.kept = Kept([first])
    answers(served, asked, variant(served, "quota=4", "dual"), 2)
    served.kept = Kept([second, first])
    monkeypatch.setattr(served, "worker", None)  # no engine can be made
    assert answers(served, asked, wanted, 4) == found and len(first.read_bytes().splitlines()) == 2
    answers(served, asked, variant(served, "quota=4", "dual"), 2)
    assert not second.exists()
    for other, cases in ((variant(served, "quota=2", "none"), asked), (wanted, asked.first(2))):
        with pytest.raises(AttributeError):
            answers(served, cases, other, 2)
    first.write_bytes(b"[]\n")
    with pytest.raises(BenchmarkError, match="--samples"):
        Kept([first])


def test_products_are_played_as_they_were(served: Served) -> None:
    asked = served.asked(Group("g", CASES[:2], chat=False), 8)
    with diffusion_products.watching() as seen:
        found = answers(served, asked, variant(served, "quota=1", "dual"), 2).samples
    assert sum(seen.rows) == sum(one.positions for one in found) and len(seen.rows) == max(
        one.forwards for one in found
    )
    fed = {rows for rows in seen.rows if rows > WIDTH} | set(seen.rows)
    assert {call.shape[-2] for call in seen.calls} <= fed | set(seen.scored) and seen.flops > 0
    heads = [call for call in seen.calls if len(cast(torch.Tensor, call.layer.weight)) == served.info.vocab_size]
    assert [call.shape[-2] for call in heads] == seen.scored
    calls = len(seen.calls)
    assert seen.play() > 0 and len(seen.calls) == calls


def test_mistakes_are_one_line(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "t.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"{i}", "reference": "1"}) for i in range(40)))
    usual = [str(full), "--task", str(task), "--quant", "none", "--memory", "1MiB", "--threads", "1", "--tokens", "8"]
    for words, message in (
        ([*usual, "--cache", "block"], "--cache block"),
        ([*usual, "--rules", "best"], "--rules best"),
        ([*usual, "--rules", "frechet=99"], "delta"),
        ([str(tmp_path), *usual[1:]], "config.json"),
        ([*usual, "--task", "no.jsonl"], "no.jsonl"),
        (["--draw", str(tmp_path / "no.json"), "--png", str(tmp_path / "x.png")], "no.json"),
    ):
        assert cli.main(["bench", "diffusion", *words]) in (1, 2)
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("slipstream: ") and message in said[-1], said
