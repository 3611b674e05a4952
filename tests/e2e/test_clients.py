"""langchain-openai and instructor against the demo model, each in a process and an environment of its own."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.e2e.process import ROOT, ServerProcess
from tests.e2e.wire import assert_idle

CLIENTS = ROOT / ".venv-clients" / "bin" / "python"


def run_client(script: str, server: ServerProcess) -> dict[str, Any]:
    """What a script of tests/clients prints."""
    assert CLIENTS.exists(), "make .venv-clients/.ready makes the environment of these clients"
    command = [str(CLIENTS), str(ROOT / "tests" / "clients" / script), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_langchain(demo: ServerProcess) -> None:
    found = run_client("langchain_chat.py", demo)
    assert "Paris" in found["whole"] and found["finish"] == "stop"
    assert found["streamed"] == found["whole"] and found["pieces"] > 3
    counts = ("input_tokens", "output_tokens", "total_tokens")
    assert [found["stream_usage"][name] for name in counts] == [found["usage"][name] for name in counts]
    (call,), (streamed,) = found["call"], found["streamed_call"]
    assert call["name"] == "get_weather" and set(call["args"]) == {"city"} and call["args"]["city"]
    assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])
    assert found["result"] == f"It is sunny in {call['args']['city']}."
    assert "sunny" in found["answer"]
    for name in ("json_schema", "functions", "json_mode"):
        assert set(found[name]) >= {"name", "country"} and all(found[name].values()), name
    assert found["batch"] == [found["whole"]] * 2
    assert found["completion"] and found["embedding"] > 100
    assert_idle(demo.url)


def test_instructor(demo: ServerProcess) -> None:
    found = run_client("instructor_models.py", demo)
    for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON", "partial"):
        person = found[mode]
        assert 0 < len(person["name"]) <= 12 and 0 <= person["age"] <= 150 and person["mood"] in ("good", "bad"), mode
    assert found["states"] > 1
    assert_idle(demo.url)
