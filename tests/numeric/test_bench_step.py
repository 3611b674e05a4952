"""`slipstream bench step`: what it counts is what the model does, and a run on a tiny model tells all it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks import step, step_ceilings
from benchmarks.step_cases import Bench, Case, Effort, Figures, grid
from benchmarks.step_ceilings import Ceilings
from benchmarks.step_parts import Parts, Split, Work, is_matrix_product, native_split, visible
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.kernels.library import library
from engine.runtime.batch import SeqInput
from engine.runtime.linear import PackedLinear, packing_available
from engine.runtime.loading import LoadedModel, load_checked
from engine.types import SamplingParams
from server import cli
from tests.tiny import save_tiny, tiny_config

QUICK = Effort(warm_up=1, least=3, seconds=0.0, split=1, ceilings=1)
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mistral", tmp_path_factory.mktemp("bench") / "mistral")


def load(folder: Path, quant: str = "none") -> LoadedModel:
    config = ModelConfig(str(folder), device="cpu", quant=quant, attention="sdpa")
    return load_checked(config, folder, lambda _: None)


def test_the_grid_is_decodes_and_verifies_over_all_batches_then_prompts() -> None:
    names = [case.name for case in grid((1, 8), (200,), (1, 4), (512,))]
    assert names == [
        "decode batch 1 kv 200",
        "decode batch 8 kv 200",
        "verify batch 1 query 4 kv 200",
        "verify batch 8 query 4 kv 200",
        "prefill batch 1 query 512 kv 0",
    ]


@pytest.mark.parametrize(("query", "kv"), [(1, 1), (1, 9), (4, 9), (9, 9), (7, 30)])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_pairs_and_keys_that_attention_sees(query: int, kv: int, window: int | None) -> None:
    reach = window or kv
    seen = {(q, k) for q in range(kv - query, kv) for k in range(q + 1) if q - k < reach}
    assert visible(query, kv, window, True) == (len(seen), len({k for _, k in seen}))
    assert visible(query, kv, None, False) == (query * kv, kv)


def test_what_counts_as_a_matrix_product() -> None:
    assert is_matrix_product(nn.Linear(4, 8)) and is_matrix_product(Conv1D(8, 4))
    assert not any(
        map(is_matrix_product, (nn.Embedding(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Sequential(nn.Linear(1, 1))))
    )
    if packing_available():
        assert is_matrix_product(PackedLinear(torch.randn(8, 4), None))


@pytest.mark.parametrize("quant", ["none", "fp16"] if packing_available() else ["none"])
def test_counted_work_is_the_models(folder: Path, quant: str) -> None:
    """Two sequences, five rows in all, all of them scored; a window of 6 tokens."""
    runner = load(folder, quant).runner(16, 4)
    attention, config = runner.attention, tiny_config("mistral")
    inputs = [SeqInput([1, 2, 3, 4], 6, (0, 1, 2), 10), SeqInput([5], 2, (4,), 3)]
    with Parts(runner, torch.device("cpu")) as parts:
        split = parts.step(lambda: runner.forward(inputs, range(5)), 0.0)
    per_layer = 64 * 24 * (4 + 2 + 2) + 24 * 4 * 64 + 3 * 64 * 96
    head = 64 * config.vocab_size
    assert split.work.gemm_flops == 2 * 5 * (4 * per_layer + head)
    least = (4 * per_layer + head) * (2 if quant == "fp16" else 4)
    # Packed outputs are filled up to whole panels, of which this tiny model has few.
    assert split.work.gemm_bytes == least if quant == "none" else least <= split.work.gemm_bytes < 1.5 * least
    pairs, keys = 4 * 6 + 3, (6 + 3) + 3
    assert split.work.attention_flops == 4 * 2 * pairs * 4 * (24 + 24)
    assert split.work.attention_bytes == 4 * (keys + 5) * 2 * (24 + 24) * 4
    assert set(split.parts) == {"gemm", "attention", "rest"} and min(split.parts.values()) > 0
    assert sum(split.parts.values()) == pytest.approx(split.device)
    # Watching ends with the block: nothing stays behind that would cost later steps time.
    assert runner.attention is attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.adapter.model.modules())


def test_floors_are_bytes_or_operations_whichever_takes_longer() -> None:
    work = Work(gemm_flops=8e9, gemm_bytes=2e9, attention_flops=1e9, attention_bytes=3e9)
    figures = Figures(Case("decode", 1, 1, 1, 1), 10.0, 9.0, 11.0, 3, {"gemm": 3.0, "rest": 1.0}, work)
    assert figures.floors_ms(Ceilings(1e9, 1e9)) == {"gemm": 8000.0, "attention": 3000.0}
    assert figures.floors_ms(Ceilings(1e9, 1e10)) == {"gemm": 2000.0, "attention": 3000.0}
    assert figures.shares == {"gemm": 0.75, "rest": 0.25}
    assert Ceilings(1.0, 4.0).better(Ceilings(2.0, 3.0)) == Ceilings(2.0, 4.0)


def test_a_native_program_tells_its_parts_itself() -> None:
    kinds = ("products", "attention", "norms", "rope", "activation", "head", "waiting", "other")
    profile = {kind: 0.1 * (place + 1) for place, kind in enumerate(kinds)} | {"calls": 1.0}
    split = native_split(Split(5.0, {"sampling": 1.0, "rest": 4.0}, Work()), profile, Work(gemm_bytes=7.0))
    assert (split.work.gemm_bytes, split.device) == (7.0, 5.0)
    assert split.parts["gemm"] == pytest.approx(0.1 + 0.6) and "calls" not in split.parts
    assert sum(split.parts.values()) == pytest.approx(5.0)
    assert split.parts["rest"] == pytest.approx(5.0 - 3.6 - 1.0)


def test_a_measured_case(folder: Path) -> None:
    cases = grid((3,), (20,), (2,), ())
    (figures,) = [Bench(load(folder), 4, cases, GREEDY).measure(case, QUICK) for case in cases]
    assert figures.steps == 3 and 0 < figures.lowest_ms <= figures.ms <= figures.highest_ms
    assert set(figures.parts_ms) == {"gemm", "attention", "sampling", "rest"}
    # q, k, v, o, gate, up and down of four layers, and the head: rows of 3 sequences of 2 tokens, all scored.
    assert figures.work.gemm_flops == 2 * 6 * (4 * (64 * 24 * 8 + 24 * 4 * 64 + 3 * 64 * 96) + 64 * 259)


def test_a_case_past_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"decode batch 1 kv 600: the model's context is 512 tokens"):
        Bench(load(folder), 4, grid((1,), (600,), (1,), ()), GREEDY)


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_ceilings._BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(step_ceilings._PRODUCT, "cpu", (64, 64, 64))
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1" if name == "OMP_NUM_THREADS" else "PASSIVE")


SMALL = ["--quick", "--batch", "1,2", "--kv", "20", "--query", "1,3", "--prefill", "32", "--set", "models.0.device=cpu"]


@pytest.mark.usefixtures("small_ceilings")
@pytest.mark.parametrize("dummy", [True, False])
def test_the_command_prints_a_table_and_writes_everything(
    dummy: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    model = ["--dummy" if dummy else "--model", str(folder)]
    drawn = ["--png", str(picture)] if dummy else []
    assert cli.main(["bench", "step", *model, *SMALL, "--output", str(output), *drawn]) == 0
    shown = capsys.readouterr().out.splitlines()
    native = ("norms", "rope", "activation", "waiting", "other") if library() is not None else ()
    assert shown[0].split() == [
        *("step", "ms", "tok/s", "gemm", "attention", *native, "sampling", "rest", "floor", "x", "floor")
    ]
    assert [line.split("kv")[0].strip() for line in shown[2:7]] == [
        "decode batch 1",
        "decode batch 2",
        "verify batch 1 query 3",
        "verify batch 2 query 3",
        "prefill batch 1 query 32",
    ]
    assert "ceilings of this run" in "\n".join(shown) and "cores busy with other processes" in shown[-1]
    record = json.loads(output.read_text())
    assert record["command"][:4] == ["slipstream", "bench", "step", model[0]] and record["title"].startswith(
        "mistral: "
    )
    assert record["device"] == "cpu" and record["dtype"] == "float32" and record["threads"] >= 1
    assert {"torch", "transformers"} <= set(record["versions"]) and set(record["other_load"]) == {
        *("before", "during", "after")
    }
    for case in record["cases"]:
        assert case["ms"] > 0 and sum(case["floors_ms"].values()) > 0 and case["work"]["attention_bytes"] > 0
    if dummy:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dummy", "qwen9"], "--dummy: 'qwen9' is none of"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--set", "models.0.quant=int9"], "models.quant"),
    ],
)
def test_what_can_not_be_measured_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "step", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("slipstream: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--batch", "1,x"], ["--query", "-1"], ["--dummy", "a", "--model", "b"]])
def test_wrong_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(arguments)
    assert arguments[0] in capsys.readouterr().err
