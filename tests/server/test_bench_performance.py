"""The performance report: figures from a record, numbers to reach, the page, and rounds of servers that do nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import performance, performance_servers, quality
from benchmarks.peers.install import Place
from benchmarks.performance_contenders import BY_NAME, CONTENDERS, EIGHT, MANY, PREFIX, QUESTIONS, SINGLE, Contender
from benchmarks.performance_figures import BY_SCENARIO, Limits, Servers, best_peer, limit, servers_of, steps_of
from benchmarks.performance_page import page
from benchmarks.performance_parts import PROGRAMS, Program, Runs, run, shown
from benchmarks.performance_record import About, Json, Part, merged, read, write
from benchmarks.performance_servers import Found, Plan, in_short
from benchmarks.performance_tables import comparison_rows, server_rows
from benchmarks.performance_targets import TARGETS, Outcome, outcomes
from benchmarks.quality_texts import cut, in_turn
from benchmarks.stream import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]
ABOUT = About("python -m benchmarks.performance", "abc", "a machine", "today", 3.0, 0.01)
GEMM = {"1": 5.0, "8": 8.0, "32": 20.0, "512": 200.0}
LIMITS = Limits("int8", 121, 140, GEMM, {"1": 4e11, "2": 8e11})


def measured(scenario: str, server: str, number: int, **values: float) -> Json:
    return {"scenario": scenario, "server": server, "round": number, "values": values, "other_load": 0.02}


def servers_part(
    measurements: Sequence[Json], tokens: Mapping[str, Mapping[str, Sequence[float]]] | None = None
) -> Part:
    side = {"version": "1", "command": ["x"], "ready_seconds": 2.0, "memory": 1_000_000}
    found = Found(rounds=2, questions="some", left_out={"vllm": "it is not set up"})
    record = {"rounds": 2, "new_tokens": 128, "questions": "some", "left_out": found.left_out}
    sides = {str(one["server"]): side for one in measurements}
    return Part(ABOUT, {**record, "sides": sides, "tokens_per_round": tokens or {}, "measurements": list(measurements)})


def steps_part() -> Part:
    work = dict.fromkeys(("gemm_flops", "gemm_bytes", "attention_flops", "attention_bytes"), 1.0)
    case = {"kind": "decode", "batch": 32, "query": 1, "kv": 200}
    parts = {"gemm": 16.0, "attention": 1.0, "rest": 3.0}
    floors = {"gemm": 9.0, "attention": 1.0}
    step = {"name": "decode batch 32 kv 200", "case": case, "ms": 22.0, "parts_ms": parts, "floors_ms": floors}
    run_of = {"title": "demo", "quant": "int8", "threads": 2, "cases": [{**step, "work": work}]}
    rates = {"1": 4e11, "2": 8e11}
    limits = {"quant": "int8", "calls": 121, "weight_bytes": 140_000_000, "gemm_ms": GEMM, "rates": rates}
    peaks = {"2": {"read": 4e10, "floats": 2e11, "bytes": 1e12}}
    json = {"step-int8": run_of, "limits-int8": limits, "peaks": peaks}
    return Part(ABOUT, {"json": json, "printed": {}, "commands": {}, "seconds": {}, "failed": {}})


ROUNDS = [
    measured(SINGLE, "int8", 1, decode=170.0),
    measured(SINGLE, "int8", 2, decode=150.0),
    measured(SINGLE, "llamacpp-q8_0", 1, decode=100.0),
    measured(SINGLE, "llamacpp-q8_0", 2, decode=120.0),
    measured(SINGLE, "openvino-int8", 1, decode=90.0),
    measured(PREFIX, "int8", 1, first_ms=300.0, second_ms=20.0),
    measured(PREFIX, "llamacpp-q8_0", 1, first_ms=1100.0, second_ms=40.0),
    measured(PREFIX, "vllm", 1, first_ms=600.0, second_ms=40.0),
    measured(QUESTIONS, "int8", 1, decode=160.0),
    measured(QUESTIONS, "int8-dflash", 1, decode=256.0),
]
PARTS = {"servers": servers_part(ROUNDS, {QUESTIONS: {"int8-dflash": [2.5, 2.7]}}), "steps": steps_part()}


def test_a_limit_is_the_products_alone_in_the_figures_own_unit() -> None:
    assert limit(LIMITS, BY_SCENARIO[SINGLE]) == 200.0
    assert limit(LIMITS, BY_SCENARIO[PREFIX]) == 200.0  # milliseconds
    # 16 requests of 123.25 + 128 tokens by 8: their prompts at 512 / 200 ms, and twice 128 steps of 8.
    assert limit(LIMITS, BY_SCENARIO[EIGHT]) == pytest.approx(1000 * 16 * 128 / (16 * 123.25 / 512 * 200 + 256 * 8))
    assert limit(LIMITS, BY_SCENARIO[MANY]) == pytest.approx(1000 * 32 * 128 / (32 * 123.25 / 512 * 200 + 128 * 20))


def test_ratios_are_made_within_rounds_and_above_one_is_better() -> None:
    found = servers_of(PARTS)
    assert found is not None
    best = best_peer(found, "int8", BY_SCENARIO[SINGLE], ("server",))
    assert best is not None and (best.name, best.median, best.ratios) == ("llamacpp-q8_0", 110.0, (1.7, 1.25))
    first = best_peer(found, "int8", BY_SCENARIO[PREFIX], ("server", "library"))
    assert first is not None and (first.name, first.ratio) == ("vllm", 2.0)
    assert best_peer(found, "int8", BY_SCENARIO[MANY], ("server",)) is None


def test_targets_are_met_missed_or_not_measured() -> None:
    reached = {one.target.title: one for one in outcomes(servers_of(PARTS), steps_of(PARTS))}
    share = reached["plain decode, one stream, int8: share of the limit of its products"]
    assert share.found == pytest.approx(0.8) and share.verdict == "met"
    assert reached["int8, one stream, beside llama.cpp Q8_0"].found == pytest.approx(1.475)
    assert reached["32 sequences, int8: products and attention's share of a step"].found == pytest.approx(0.85)
    drafting = reached["DFlash in int8, questions, beside ours without it"]
    assert (drafting.found, drafting.tokens, drafting.verdict) == (1.6, 2.6, "met")
    assert reached["first token of 512, int8, beside the best server"].found == 2.0
    assert reached["32 clients, int8, beside the best server"].verdict == "not measured"
    assert Outcome(TARGETS[0], 0.79).verdict == "missed"
    assert {one.verdict for one in outcomes(None, None)} == {"not measured"}


def test_the_targets_name_contenders_and_scenarios_that_there_are() -> None:
    kinds = {"limit", "step", "server", "library", "any"}
    for target in TARGETS:
        assert target.ours in BY_NAME and target.scenario in BY_SCENARIO
        assert target.beside in kinds or target.beside in BY_NAME
    assert len(BY_NAME) == len(CONTENDERS)


def test_tables_have_a_cell_for_every_head() -> None:
    found = servers_of(PARTS)
    assert found is not None
    for rows in (server_rows(found), comparison_rows(found, steps_of(PARTS)), comparison_rows(found, None)):
        assert len(rows) > 2 and {len(row) for row in rows} == {len(rows[0])}


def test_the_page_tells_what_was_missed_and_what_was_not_measured() -> None:
    assert "Not measured in this run." in page({})
    slow = [measured(SINGLE, "int8", 1, decode=100.0)]
    text = page({**PARTS, "servers": servers_part(slow)})
    assert "0.50 | 100 of 200 |  | **missed** |" in text
    assert "From token to token, as a client sees it: 10.00 ms." in text
    assert "- vllm: it is not set up" in text and "$" not in text
    assert "| int8 | 140 | 5.00 | 8.00 | 20.00 | 200.00 | 3.50 | 400 | 800 | 0.80 |" in text
    assert "| int8 | decode batch 32 kv 200 | 22.00 | 17.60 (80 %) |" in text


def test_a_part_replaces_its_own_and_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "performance.json"
    assert read(file) == {}
    write(file, merged({"steps": Part(ABOUT, {"a": 1}), "host": Part(ABOUT, {"b": 2})}, "host", ABOUT, {"b": 3}))
    assert {name: part.found for name, part in read(file).items()} == {"steps": {"a": 1}, "host": {"b": 3}}
    assert list(file.parent.iterdir()) == [file]


def test_a_program_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text('{"x": 1}')
    fine = Program("fine", ("json.tool", str(source), "{json}"), 60)
    programs = (Program("none", ("benchmarks.no_such_program", "{json}"), 60), fine, Program("silent", ("this",), 60))
    seen: list[int] = []
    runs = run(programs, tmp_path, False, Runs(json={"none": "earlier"}), lambda runs: seen.append(len(runs.json)))
    assert runs.json == {"none": "earlier", "fine": {"x": 1}}
    assert "No module named" in runs.failed["none"] and "silent" in runs.failed and len(seen) == 3
    again = Program("silent", fine.arguments, 60)
    assert run((again,), tmp_path, False, runs, lambda _: None).failed.keys() == {"none"}


def test_commands_of_programs_are_told_without_this_machines_folders() -> None:
    for program in (one for programs in PROGRAMS.values() for one in programs):
        assert sys.executable not in shown(program, True) and str(ROOT) not in shown(program, True)
    assert performance.public(["--parts", "steps", "--folder", "/x", "--venv=a=/y", "--quick"]) == [
        *("--parts", "steps", "--quick")
    ]


@pytest.mark.parametrize("arguments", ["--parts everything", "--contenders somebody", "--scenarios single,none-such"])
def test_a_complaint_names_the_flag(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        performance.parser().parse_args(arguments.split())
    assert f"argument {arguments.split()[0]}: " in capsys.readouterr().err


def test_a_quick_run_leaves_the_record_alone(tmp_path: Path) -> None:
    assert performance.files(False, None).page == ROOT / "docs" / "performance.md"
    assert ROOT / "build" in performance.files(True, None).json.parents
    assert performance.files(False, tmp_path).images == tmp_path / "images"


def test_windows_are_whole_and_prompts_come_in_turn() -> None:
    assert cut(range(10), 3, 7) == [(0, 1, 2), (3, 4, 5)]
    assert in_turn([[(1,), (2,)], [(3,)]], 3) == ((1,), (3,), (2,))


def test_quality_goes_on_only_on_the_same_text(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    quality.write(file, {"digest": "x", "rows": {"int8, KV fp32": {"positions": 1}}})
    assert quality.known(file, "x") == {"int8, KV fp32": {"positions": 1}}
    assert quality.known(file, "y") == quality.known(tmp_path / "none", "x") == {}


# ---- a round ------------------------------------------------------------------------------------------------


class Words:
    """Every word is a token."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def render_chat(self, messages: Sequence[Mapping[str, object]]) -> str:
        return f"user: {messages[0]['content']}"


@pytest.mark.asyncio
async def test_a_run_measures_everybody_in_rounds_and_leaves_out_who_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(self: Contender) -> tuple[str, ...]:
        script = str(ROOT / "benchmarks" / ("null_server.py" if self.quant != "broken" else "no_such_server.py"))
        return (sys.executable, script, "--interval-ms", "1", "--port", "{port}")

    monkeypatch.setattr(Contender, "command", command)
    seats = tuple(Contender(name, name, "ours", name, True) for name in ("one", "two", "broken"))
    plan = Plan(seats, (SINGLE, QUESTIONS), 2, 1.0, 3, 7, 20.0)
    rounds: list[int] = []
    found = await performance_servers.run(
        plan, Place(tmp_path, tmp_path), Words(), lambda found: rounds.append(found.rounds)
    )
    assert rounds == [1, 2] and found.left_out.keys() == {"broken"}
    seen = [(one.scenario, one.server, one.round) for one in found.measurements]
    assert len(seen) == len(set(seen)) == 8
    assert all(one.values["decode"] > 0 for one in found.measurements)
    assert found.record(plan)["sides"].keys() == {"one", "two"}  # type: ignore[attr-defined]
    # What cannot fit is not begun.
    hurried = Plan(seats[:1], (SINGLE,), 9, 0.0, 3, 7, 20.0)
    cut_short = await performance_servers.run(hurried, Place(tmp_path, tmp_path), Words(), lambda _: None)
    assert cut_short.rounds == 1


def test_a_reason_is_one_line() -> None:
    assert in_short(BenchmarkError("it ended:\nlog\n last words \n")) == "it ended: last words"
    assert in_short(BenchmarkError("not set up")) == "not set up"


def test_a_record_can_be_read_back() -> None:
    found = Found(rounds=1, questions="q")
    plan = Plan((), (), 1, 1.0, 3, 7)
    part = Part(ABOUT, found.record(plan))
    read_back = servers_of({"servers": part})
    assert isinstance(read_back, Servers) and read_back.present() == []
