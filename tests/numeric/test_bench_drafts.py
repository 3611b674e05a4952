"""The draft benchmarks on a tiny random model: every kind runs to its end, and writes what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import drafts
from tests.contract import neural
from tests.tiny import save_tiny, tiny_config


@pytest.fixture(scope="module", autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, drafts and prompts, as arguments."""
    folder = tmp_path_factory.mktemp("bench")
    model, config = save_tiny("llama", folder / "model"), tiny_config("llama")
    dflash, eagle3 = neural.save_dflash(config, folder / "dflash"), neural.save_eagle3(config, folder / "eagle3")
    for name in ("one", "two"):
        lines = [json.dumps({"prompt": f"{name} {i} " + "abc" * (4 + 5 * i)}) for i in range(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    draft = [f"dflash={dflash}", f"dflash+tree={dflash}", f"eagle3={eagle3}", "ngram"]
    prompts = [str(folder / f"{name}.jsonl") for name in ("one", "two")]
    arguments = ["--model", str(model), "--memory", "4MiB", "--sources", *prompts, "--quant", "none", "--threads", "1"]
    return [*arguments, *(part for one in draft for part in ("--draft", one))]


def run(given: list[str], folder: Path, what: str, *more: str) -> tuple[str, Any]:
    """The Markdown page and what was found."""
    files = {kind: folder / f"x.{kind}" for kind in ("json", "markdown", "png")}
    flags = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert drafts.main([what, *given, *more, *(flags if what != "agreement" else flags[:4])]) == 0
    if what != "agreement":
        assert files["png"].read_bytes()[:4] == b"\x89PNG"
    record = json.loads(files["json"].read_bytes())
    assert record["command"].startswith(f"python -m benchmarks.drafts {what}") and record["machine"]
    return files["markdown"].read_text(), record["found"]


def test_acceptance(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, found = run(given, tmp_path, "acceptance", "--prompts", "3", "--tokens", "20")
    assert "tokens per round" in capsys.readouterr().out and "| ngram |" in page
    by = {(one["drafter"], Path(one["prompts"]).stem): one for one in found}
    assert set(by) == {(d, p) for d in ("dflash", "dflash+tree", "eagle3", "ngram") for p in ("one", "two", "all")}
    for one in found:
        figures = one["figures"]
        assert sum(figures["histogram"]) == figures["rounds"]
        assert one["tokens_per_round"] >= 1.0
    assert by["dflash", "all"]["figures"]["offered"] == [by["dflash", "all"]["figures"]["rounds"]] * 5, "whole blocks"
    assert by["ngram", "all"]["tokens_per_round"] > 1.2, "answers of this model go round in circles"


def test_agreement(given: list[str], tmp_path: Path) -> None:
    page, found = run(given[:-4], tmp_path, "agreement", "--prompts", "5", "--tokens", "32", "--clients", "5")
    assert len(found) == 2 * 6 and page.count("alone") == 2
    for one in found:
        assert (one["found"]["equal"], one["found"]["of"]) == (5, 5), one
        if one["drafter"] == "dflash":  # a tree's slots keep others waiting from the start, in answers so short
            assert (one["condition"] == "preempted") == (one["preemptions"] > 0), one
        assert (one["condition"] == "prefix hits") == (one["cached_tokens"] > 0), one


def test_compare(given: list[str], tmp_path: Path) -> None:
    page, found = run(given, tmp_path, "compare", "--tokens", "12", "--rounds", "2", "--concurrency", "1,4")
    rows = found["rows"]
    assert [(one["clients"], one["variant"]) for one in rows[::5]] == [(1, "none"), (4, "none")]
    assert all(one["same"]["equal"] == one["same"]["of"] > 0 for one in rows)
    assert all(one["speed_ratio"]["median"] == 1.0 for one in rows[::5]) and "4 | dflash+tree" in page
    assert len(found["runs"]) == 2 * 2 * 5 and all(one["seconds"] > 0 for one in found["runs"])
    memory = {one["variant"]: one for one in found["memory"]}
    assert memory["none"]["draft_weights"] == memory["ngram"]["draft_pool"] == 0
    assert memory["dflash"]["draft_weights"] > 0 and memory["eagle3"]["draft_pool"] > 0


def test_mistakes_are_told(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drafts.main(["compare", *given[:6], "--draft", f"dflash={tmp_path}"]) == 1
    assert "error: dflash" in capsys.readouterr().err
    assert drafts.main(["compare", "--json", "no/such/folder/x.json"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
