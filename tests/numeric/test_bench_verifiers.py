"""`slipstream bench verifiers` on a tiny random pair: it runs to its end under every verifier, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import verifiers
from benchmarks.verifiers_task import Group, Question
from engine.models.fingerprint import fingerprint
from engine.models.verifier_head import HeadSpec, save_head, tensor_shapes
from server import cli
from tests.contract import neural
from tests.tiny import save_tiny, tiny_config


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
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, draft and prompts, as arguments."""
    folder = tmp_path_factory.mktemp("bench")
    model, draft = save_tiny("llama", folder / "model"), neural.save_dflash(tiny_config("llama"), folder / "dflash")
    lines = [json.dumps({"prompt": f"{i} " + "abc" * (4 + 5 * i)}) for i in range(4)]
    (folder / "asked.jsonl").write_text("\n".join(lines))
    arguments = [str(model), "--draft", str(draft), "--sources", str(folder / "asked.jsonl"), "--memory", "4MiB"]
    return [*arguments, "--quant", "none", "--threads", "1"]


def run(given: list[str], folder: Path, *more: str) -> tuple[str, Any]:
    """The Markdown page and the record."""
    files = {kind: folder / f"x.{kind}" for kind in ("json", "markdown", "png")}
    flags = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert cli.main(["bench", "verifiers", *given, *more, *flags]) == 0
    assert files["png"].read_bytes()[:4] == b"\x89PNG" and len(files["png"].read_bytes()) > 10_000
    text = files["json"].read_text()
    assert str(folder.parent) not in text + files["markdown"].read_text(), "no paths of this machine"
    return files["markdown"].read_text(), json.loads(text)


def test_everything_that_is_offered(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, record = run(given, tmp_path, "--questions", "2", "--tokens", "12", "--speed", "none")
    assert record["command"].startswith("slipstream bench verifiers model --draft dflash --sources asked.jsonl")
    assert record["machine"] and record["commit"] and record["options"]["temperatures"] == [0.0, 1.0]
    shown = capsys.readouterr().out
    assert "temperature 0, general: 2 questions" in shown and "Not offered for this pair: diversed." in shown
    answers = {(one["temperature"], one["variant"]): one for one in record["answers"]}
    kinds = {one["verifier"] for one in record["answers"]}
    assert kinds == {
        *("strict", "rejection", "block", "ensemble", "bounded", "lenient", "typical", "top_k_gap"),
    }
    for (temperature, name), one in answers.items():
        assert one["tokens_per_round"]["low"] <= one["tokens_per_round"]["value"] <= one["tokens_per_round"]["high"]
        assert one["nll"]["value"] > 0 and 0 <= one["target_best"]["value"] <= 1, name
        lossless = one["bias_bound"] == 0
        assert (one["bias"]["value"] == 0) if lossless else (one["bias"]["value"] <= 1), name
        assert (one["equal_answers"] is None) == (temperature > 0) and f"| {name} |" in page
        assert sum(one["histogram"]) > 0 and one["score"] is None
    greedy = answers[0.0, "strict"]
    assert greedy["target_best"]["value"] == greedy["equal_answers"]["value"] == greedy["equal_tokens"]["value"] == 1
    assert not any(name.endswith("drawn") for temperature, name in answers if temperature == 0)
    assert any(answers[1.0, name]["bias"]["value"] > 0 for name in ("ensemble 0.3", "ensemble 0.3 drawn"))


def test_a_head_brings_diversed(given: list[str], tmp_path: Path) -> None:
    model, draft = Path(given[0]), Path(given[2])
    spec = HeadSpec(64, 64, 1, fingerprint(model), fingerprint(draft))
    save_head(tmp_path / "head", spec, {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()})
    words = [
        "--head",
        str(tmp_path / "head"),
        "--verifiers",
        "diversed=1,.7,0",
        "--temperature",
        "1",
        "--questions",
        "3",
    ]
    _, record = run(given, tmp_path, *words, "--tokens", "20", "--speed", "none")
    bias = {one["variant"]: one["bias"]["value"] for one in record["answers"]}
    assert list(bias) == ["strict", "diversed 1", "diversed 0.7", "diversed 0"]
    assert bias["strict"] == bias["diversed 1"] == 0 < bias["diversed 0.7"] <= 0.3 and 0 < bias["diversed 0"] <= 0.5


@pytest.mark.parametrize("speed", ["adaptive", "whole"])
def test_speeds_are_taken_in_turns(speed: str, given: list[str], tmp_path: Path) -> None:
    words = ["--verifiers", "block+drawn", "--rounds", "2", "--speed-tokens", "8", "--batch", "1,2", "--questions", "2"]
    page, record = run(given, tmp_path, *words, "--temperature", "1", "--speed", speed, "--tokens", "8")
    timed = [(one["batch"], one["variant"], len(one["speeds"])) for one in record["speeds"]]
    assert timed == [(1, "strict", 2), (1, "block drawn", 2), (2, "strict", 2), (2, "block drawn", 2)]
    assert all(min(one["speeds"]) > 0 and one["over_strict"]["median"] > 0 for one in record["speeds"])
    assert "tok/s, 2 at once" in page and record["speeds"][0]["over_strict"]["median"] == 1


def test_a_task_is_scored(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer ends where the task says; what it was asked is no chat."""
    questions = tuple(Question(f"q{i}", "abc" * (3 + i), lambda text: len(text) / 12) for i in range(4))
    monkeypatch.setattr(verifiers, "task", lambda source, count, *_: Group(source, questions[:count], False, (), 12))
    words = ["--task", "fill", "--verifiers", "ensemble=.5", "--temperature", ".7", "--speed", "none", "--samples", "2"]
    page, record = run(given, tmp_path, *words, "--tokens", "9", "--prompts", "3", "--questions", "3")
    assert [(one["group"], one["variant"]) for one in record["answers"]] == [
        *(("fill", "strict"), ("fill", "ensemble 0.5"), ("general", "strict"), ("general", "ensemble 0.5")),
    ]
    scored, general = record["answers"][1], record["answers"][3]
    assert scored["score"]["value"] > 0 and scored["less_strict"]["score"] is not None and general["score"] is None
    assert (scored["prompts"], scored["answers"]) == (3, 6) and "less strict's" in page and record["speeds"] == []
    assert scored["answer_tokens"]["value"] <= 12 and general["answer_tokens"]["value"] <= 9


def test_mistakes_are_one_line(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rest = given[:1], given[3:]
    for words, message in (
        ([*given, "--verifiers", "diversed=.5"], "--verifiers diversed"),
        ([*given, "--verifiers", "ensemble=2"], "target_weight must be"),
        ([*model, "--draft", str(tmp_path), *rest], "config.json"),
        ([*given, "--sources", "no.jsonl"], "no.jsonl"),
        ([*given, "--task", "no.jsonl"], "no.jsonl"),
    ):
        assert cli.main(["bench", "verifiers", *words]) in (1, 2)
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("slipstream: ") and message in said[-1], said
