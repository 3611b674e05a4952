"""`slipstream top`: numbers from real pages of metrics, frames that fit, and a terminal that is given back."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fcntl import ioctl
from functools import cache
from pathlib import Path

import pytest

from engine.types import EngineStats, FinishReason, ModelInfo, Passes, RequestSummary, Usage, VerifierStats
from engine.verification import VerifierCard
from server.cli import main
from server.metrics import Metrics
from server.top.frame import Detail, Screen, block, frame
from server.top.samples import Look, Sample, read_metrics
from server.top.view import ModelView, Quantiles, VerifierRow, quantile, restarted, views
from tests.denoisers import FULL_INFO
from tests.e2e.scripted import ScriptedServer
from tests.server.fake_engine import FakeEngine

USUAL = Screen()
ROOT = Path(__file__).parents[2]
INFO = ModelInfo("m", "demo", 8192, 49152, (2,), 16, 700, 1, "fp16", "speculative", drafter="dflash", max_draft=4)
DRAFTED = replace(INFO, verifier="strict", verifiers=(VerifierCard("strict", True, "exact"),))
DENOISED = replace(INFO, drafter="", max_draft=0, diffusion=FULL_INFO, pipeline="masked_diffusion")
EARLY = EngineStats(
    steps=10,
    spec_rounds=10,
    spec_drafted=40,
    spec_accepted=4,
    spec_accepted_at=(4, 0, 0, 0),
    verifiers=(VerifierStats("strict", 10, 40, 4, 14, 0.0),),
)
LATE = replace(
    EARLY,
    steps=30,
    running=3,
    waiting=1,
    kv_blocks_used=350,
    kv_blocks_total=700,
    preemptions=2,
    prefix_queries=100,
    prefix_hits=25,
    step_tokens=8,
    step_seconds=0.02,
    spec_rounds=30,
    spec_drafted=120,
    spec_accepted=44,
    spec_accepted_at=(24, 12, 8, 0),
    verifiers=(VerifierStats("strict", 30, 120, 44, 74, 0.6),),
)
SUMMARY = RequestSummary(Usage(100, 21, 60), FinishReason.LENGTH, 21, 1, 3.0, 0.5, 0.5, 2.0, 1.0, 0)


def look_of(metrics: Metrics, at: float, **changes: object) -> Look:
    models, limited = read_metrics(metrics.render()[0].decode())
    look = Look(at, "ok", "", True, 4, False, limited, models)
    return replace(look, **changes)  # type: ignore[arg-type]


def two_looks(info: ModelInfo = DRAFTED, early: EngineStats = EARLY, late: EngineStats = LATE) -> tuple[Look, Look]:
    """Two seconds apart; what happened before the first must not count."""
    metrics = Metrics()
    observer = metrics.observer(info.id, info)
    metrics.watch(info.id, lambda: True)
    metrics.watch_key("anonymous", lambda: 4)
    observer.on_step(early)
    observer.on_tokens(7, True, 5.0)
    observer.on_finish(SUMMARY)
    before = look_of(metrics, 100.0)
    observer.on_step(late)
    observer.on_tokens(10, True, 0.05)
    observer.on_tokens(30, False, 0.02)
    observer.on_finish(SUMMARY)
    observer.on_finish(replace(SUMMARY, finish=FinishReason.ERROR))
    observer.on_rejected("max_num_queued_reqs")
    metrics.limited("anonymous", "tokens")
    return before, look_of(metrics, 102.0)


def test_what_happened_between_two_looks() -> None:
    before, now = two_looks()
    (view,) = views(before, now)
    assert (view.name, view.healthy, view.running, view.waiting, view.kv_usage) == ("m", True, 3, 1, 0.5)
    assert (view.prompt_tokens, view.cached_tokens, view.generated_tokens) == (100.0, 60.0, 20.0)
    assert (view.finished, view.failed, view.refused, view.preempted) == (1.0, 0.5, 0.5, 1.0)
    assert view.prefix_hits == 0.25 and view.tokens_per_step == 8
    assert (view.first_token.half, view.first_token.most) == pytest.approx((0.05, 0.059))
    assert (view.between_tokens.half, view.between_tokens.most) == pytest.approx((0.0175, 0.02425))
    assert view.drafting is not None and view.denoising is None
    assert view.drafting.acceptance == 0.5 and view.drafting.tokens == 3.0
    assert view.drafting.positions == (1.0, 0.6, 0.4, 0.0)
    (row,) = view.drafting.verifiers
    assert replace(row, bias=0.0) == VerifierRow("strict", 10.0, 0.5, 3.0, 0.0) and row.bias == pytest.approx(0.01)
    assert now.limited == 1


def test_denoising() -> None:
    early = EngineStats(steps=1, denoised=Passes(2, 0, 0, 0, 40), denoise_steps=2, denoise_committed=1)
    late = EngineStats(steps=5, denoised=Passes(12, 0, 0, 2, 240), denoise_steps=10, denoise_committed=21)
    (view,) = views(*two_looks(DENOISED, early, late))
    assert view.drafting is None and view.denoising is not None
    assert (view.denoising.tokens_per_forward, view.denoising.tokens_per_step) == (2.0, 2.5)
    assert (view.denoising.forwards, view.denoising.positions_per_token, view.denoising.remasked) == (5.0, 10.0, 0.1)


def test_nothing_between_two_looks() -> None:
    _, now = two_looks()
    (view,) = views(now, replace(now, at=103.0))
    assert view.first_token == Quantiles(None, None) and view.prefix_hits is None
    assert view.drafting is not None and view.drafting.positions == () and view.drafting.tokens is None
    assert "nothing was drafted" in text([view])


def test_a_model_that_was_not_there_before_and_an_engine_that_began_anew() -> None:
    before, now = two_looks()
    (view,) = views(replace(before, models={}), now)
    assert view.generated_tokens == 23.5
    assert not restarted(before, now) and restarted(now, before) and not restarted(replace(before, models={}), now)


@pytest.mark.parametrize(
    "share, before, now, found",
    [
        (0.5, (), ((1.0, 0.0), (2.0, 4.0), (float("inf"), 4.0)), 1.5),
        (0.5, ((1.0, 2.0), (2.0, 2.0)), ((1.0, 6.0), (2.0, 6.0)), 0.5),
        (0.95, (), ((1.0, 1.0), (2.0, 2.0), (float("inf"), 10.0)), 2.0),  # as Prometheus: the last bound that there is
        (0.5, (), (), None),
        (0.5, ((1.0, 3.0),), ((1.0, 3.0),), None),
    ],
)
def test_quantiles(share: float, before: tuple, now: tuple, found: float | None) -> None:
    assert quantile(share, before, now) == found


def test_what_is_no_page_of_metrics() -> None:
    assert read_metrics("") == ({}, 0.0)
    with pytest.raises(ValueError):
        read_metrics("<html>nonsense</html>")


# ---- frames ------------------------------------------------------------------------------------------------


def text(models: list[ModelView], screen: Screen = USUAL, look: Look | None = None, notice: str = "") -> str:
    look = look or Look(0.0, "ok", "", True, 2, False, 0.0, {})
    return frame("http://h:1", look, models, notice, "12:00:00", screen)


@cache
def busy() -> ModelView:
    (found,) = views(*two_looks())
    return found


def view(name: str = "m", **changes: object) -> ModelView:
    found = busy()
    return replace(found, name=name, **changes)  # type: ignore[arg-type]


def test_a_frame_at_80_by_24() -> None:
    shown = text([view("demo")])
    assert shown.splitlines() == [
        "slipstream top http://h:1  ready",
        "12:00:00  q leaves   requests being answered: 2",
        "",
        "demo ok  running 3  waiting 1  KV ██████████░░░░░░░░░░ 50%",
        " tokens/s   in    100.0 (60.0 cached)   out     20.0   prefix hits 25%",
        " latency    first token 50.0 / 59.0 ms   between tokens 17.5 / 24.2 ms   (50 / 9",
        " requests/s 1.00  failed 0.50  refused 0.50  preempted 1.00",
        " steps      17.5 / 24.2 ms   8.00 tokens each",
        " drafts     tokens a round 3.00   acceptance 50%",
        "            ██",
        "            ██  ▃▃",
        "            ██  ██  ▅▅",
        "            ██  ██  ██",
        " % by place 100 60  40  0",
        " verifier      rounds/s  acceptance  tokens/round  bias/token",
        " strict            10.0         50%          3.00      0.0100",
    ]


@pytest.mark.parametrize("width, height", [(80, 24), (40, 10), (20, 4), (200, 60)])
@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_frames_fit_any_terminal(width: int, height: int, count: int) -> None:
    models = [view(f"model-{i}-" + "x" * 40, healthy=bool(i % 2)) for i in range(count)]
    for colours in (False, True):
        lines = text(models, Screen(width, height, colours)).split("\n")
        plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
        assert len(lines) <= height and max(map(len, plain)) <= width
        assert ("\x1b" in "".join(lines)) is colours
    if count == 12 and height < 12:
        assert "more models" in plain[-1] or width == 20


def test_detail_follows_room() -> None:
    sizes = [len(block(view(), detail, Screen())) for detail in Detail]
    assert sizes == sorted(sizes) and sizes[0] == 1 and len(set(sizes)) == len(sizes)
    several = text([view("a"), view("b"), view("c")])
    assert several.count("running 3") == 3 and "more models" not in several


def test_a_terminal_without_blocks() -> None:
    shown = text([view("a")], Screen(blocks=False))
    assert shown.isascii() and "##########.........." in shown


def test_what_a_server_says_can_not_move_the_cursor() -> None:
    look = Look(0.0, "unhealthy", "x\x1b[2J\r\n", False, 0, False, 0.0, {})
    shown = text([view("evil\x1b[31m\x07")], look=look)
    assert "\x1b" not in shown and "\x07" not in shown and "evil?[31m?" in shown and "unhealthy: x?[2J??" in shown
    assert "宽" * 12 in text([view("宽" * 30)]) and max(map(len, text([view("宽" * 30)]).splitlines())) <= 80


def test_states() -> None:
    look = Look(0.0, "ok", "", True, 0, True, 5.0, {})
    assert "draining" in text([], look=look) and "refused by limits so far: 5" in text([], look=look)
    assert "not ready" in text([], look=replace(look, draining=False, ready=False))
    assert "no answer" in text([], notice="no answer")
    assert "NOT HEALTHY" in text([view(healthy=False)])
    assert "looking" in frame("u", None, [], "looking for it", "t", Screen())
    assert Sample({}, {("a", "b"): 1.0}, {}).of("a") == {"b": 1.0}


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(FakeEngine(stands=(4, 1))) as running:
        yield running


def test_once(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--interval", "0.1", "--url", server.url]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"slipstream top {server.url}  ready\n") and "\ntiny ok  running 0" in shown
    assert "\x1b" not in shown
    assert main(["top", "--once", "--interval", "0.1", "--url", server.url, "--model", "other"]) == 0
    assert "serves no model other; it has: tiny" in capsys.readouterr().out


def test_once_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["top", "--once", "--url", f"127.0.0.1:{port}"]) == 1
    assert f"no server answers at 127.0.0.1:{port}: " in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpcore leaves the socket to chance
def test_once_without_a_socket(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--url", "unix:/nowhere/x.sock"]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--interval", "0"], ["--interval", "x"], ["--nonsense"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", *arguments])
    assert ended.value.code == 2


class Terminal:
    """The command at a terminal of 80 by 24."""

    def __init__(self, url: str) -> None:
        self._ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "top", "--url", url, "--interval", "0.1"],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"},
            start_new_session=True,
        )
        self.seen = ""

    def until(self, wanted: str) -> None:
        """Read what it draws until this is there, from here on."""
        deadline, self.seen = time.monotonic() + 30, ""
        while wanted not in self.seen:
            assert time.monotonic() < deadline, self.seen[-3000:]
            if select.select([self._ours], [], [], 1.0)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self.theirs)


@contextmanager
def terminal(url: str) -> Iterator[Terminal]:
    opened = Terminal(url)
    try:
        yield opened
    finally:
        opened.close()


def test_it_follows_a_server_that_goes_and_comes_back(server: ScriptedServer) -> None:
    with ScriptedServer() as first, terminal(first.url) as watching:
        watching.until("\x1b[?1049h")
        watching.until("running 0")
        first.__exit__(None, None, None)
        watching.until("no answer, trying again")
        with ScriptedServer(port=first.port):
            watching.until("running 0")
            watching.type("x")
            watching.until("running 0")
            watching.type("q")
            watching.until("\x1b[?1049l")
            assert watching.process.wait(10) == 0
        assert termios.tcgetattr(watching.theirs) == watching.before


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_terminal_is_given_back(server: ScriptedServer, number: signal.Signals, status: int) -> None:
    with terminal(server.url) as watching:
        watching.until("running 0")
        watching.process.send_signal(number)
        watching.until("\x1b[?25h\x1b[?1049l")
        assert watching.process.wait(10) == status
        assert termios.tcgetattr(watching.theirs) == watching.before
