"""What the user of the command line sees: the start-up table, its line to paste, log lines."""

from __future__ import annotations

import io
import json
import logging
import subprocess

import pytest

from engine.types import Phase
from server import launch
from server.settings import load_settings
from server.startup import StartupTable, base_url, curl


def test_the_startup_table_ends_with_a_line_to_paste() -> None:
    out = io.StringIO()
    table = StartupTable("http://127.0.0.1:8000", ["demo", "two"], needs_key=False, out=out)
    table.add(Phase("weights", 1.25, 300 << 20, "fp16"))
    table.add(Phase("first token", 0.04, 0))
    table.finish()
    head, weights, first, ready, _, where, _, paste = out.getvalue().splitlines()
    assert head.split() == ["phase", "seconds", "memory"]
    assert weights.split() == ["weights", "1.2", "300", "MB", "fp16"]
    assert first.split() == ["first", "token", "0.0", "-"]
    assert ready.startswith("ready ") and where.startswith("demo, two at http://127.0.0.1:8000/v1 ")
    assert paste == curl("http://127.0.0.1:8000", "demo", needs_key=False)


@pytest.mark.parametrize("model", ["demo", 'it\'s $HOME `id` \\ "x"', "模型"])
@pytest.mark.parametrize("needs_key", [False, True])
def test_the_line_survives_a_shell(model: str, needs_key: bool) -> None:
    url = base_url("0.0.0.0", 8000)
    script = 'curl() { for word in "$@"; do printf "%s\\0" "$word"; done; }; ' + curl(url, model, needs_key=needs_key)
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    where, *rest = words
    body = json.loads(rest[rest.index("-d") + 1])
    assert where == "http://127.0.0.1:8000/v1/chat/completions"
    assert body["model"] == model and body["messages"][0]["role"] == "user"
    assert ("Authorization: Bearer YOUR_API_KEY" in rest) == needs_key


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("::1", "http://[::1]:1"), ("box", "http://box:1")],
)
def test_where_a_local_client_finds_the_server(host: str, url: str) -> None:
    assert base_url(host, 1) == url


@pytest.mark.parametrize("style", ["text", "json"])
def test_log_lines(style: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    launch.set_up_logging(load_settings({"log_format": style, "log_level": "warning"}))
    logger = logging.getLogger("engine.test")
    logger.info("not shown")
    try:
        raise ValueError("why")
    except ValueError:
        logger.warning("löst %d", 3, exc_info=True)
    shown = capfd.readouterr().err
    if style == "json":
        line = json.loads(shown)
        assert (line["level"], line["logger"], line["message"]) == ("warning", "engine.test", "löst 3")
        assert "ValueError: why" in line["traceback"]
    else:
        assert "WARNING engine.test: löst 3\nTraceback" in shown and "not shown" not in shown
