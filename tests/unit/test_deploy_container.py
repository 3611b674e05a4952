"""The container's files against the code they start: pins, paths, settings, the entrypoint and the health check.

What needs an engine to build or run containers is in docs/operations.md, with what came of it.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from engine.hub.resolve import DEMO_INSTALL
from server.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRYPOINT = ROOT / "deploy/container/entrypoint.sh"
HEALTHCHECK = ROOT / "deploy/container/healthcheck.py"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def stages() -> dict[str, str]:
    """Stage name -> its instructions, joined lines, without comments."""
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE).replace("\\\n", " ")
    parts = re.split(r"(?m)^(?=FROM )", text)[1:]
    return {part.split("\n", 1)[0].split()[-1]: part for part in parts}


def argument(name: str) -> str:
    found = re.search(rf"(?m)^ARG {name}=(.*)$", DOCKERFILE)
    assert found, name
    return found[1]


def test_versions_are_the_projects() -> None:
    assert argument("DEMO_MODEL") == shlex.split(DEMO_INSTALL)[-1]
    assert argument("DEMO_MODEL") in (ROOT / "Makefile").read_text()
    assert argument("VERSION") == PROJECT["project"]["version"]
    python = re.search(r"python:(\d+\.\d+)\.\d+-slim", argument("PYTHON_IMAGE"))
    assert python and PROJECT["project"]["requires-python"] == f">={python[1]}"
    cuda = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel", argument("CUDA_IMAGE"))
    assert cuda and f"source=/usr/local/cuda-{cuda[1]}," in DOCKERFILE


def test_every_image_is_pinned() -> None:
    images = [argument("PYTHON_IMAGE"), argument("CUDA_IMAGE")]
    images += [service["image"] for name, service in COMPOSE["services"].items() if name != "server"]
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image) for image in images), (
        images
    )


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_nothing_is_built_in_a_final_image(target: str) -> None:
    final = stages()["runtime"] + stages()[target]
    assert stages()[target].startswith("FROM runtime ")
    steps = re.findall(r"(?m)^RUN (.*)$", final)
    assert not [step for step in steps if re.search(r"\b(apt-get|pip|gcc|g\+\+|make|nvcc)\b", step)]
    assert re.findall(r"(?m)^USER (.*)$", final) == ["10001:0"]
    for instruction in ("ENTRYPOINT", "CMD"):  # the exec form: signals reach the process
        assert re.search(rf'(?m)^{instruction} \["', final), instruction
    assert re.search(r"(?m)^HEALTHCHECK .*slipstream-healthcheck.py", final)
    assert "STOPSIGNAL SIGTERM" in final and "EXPOSE 8000" in final


def test_a_plain_build_makes_the_cpu_image() -> None:
    assert list(stages())[-1] == "cpu"


def test_what_the_image_copies_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored  # only what is named reaches it
    admitted = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", DOCKERFILE):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == name or source.startswith(f"{name}/") for name in admitted), source
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(re.findall(r"(?m)^COPY (\w+) \1$", DOCKERFILE))


def test_settings_are_known() -> None:
    known = {f"SLIPSTREAM_{name.upper()}" for name in Settings.model_fields}
    image = set(re.findall(r"\bSLIPSTREAM_[A-Z_]+(?==)", stages()["runtime"]))
    compose = {name for name in COMPOSE["services"]["server"]["environment"] if name.startswith("SLIPSTREAM_")}
    assert image | compose <= known and "SLIPSTREAM_CACHE_DIR" in image


def test_compose_opens_nothing_to_the_network_by_itself() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
        assert service["deploy"]["resources"]["limits"]["memory"], name
    server = COMPOSE["services"]["server"]
    assert server["read_only"] and server["ports"][0].endswith(":8000")
    assert float(server["stop_grace_period"].removesuffix("s")) > Settings().drain_timeout + 5
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["server:8000"]


def test_compose_mounts_what_is_there() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), (name, source)


@contextlib.contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server on loopback whose /health answers `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def check_health(**environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", HEALTHCHECK], env=environment, capture_output=True, text=True, timeout=20
    )
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("status, expected", [(200, 0), (503, 1), (404, 1)])
def test_the_health_check_follows_the_server(status: int, expected: int) -> None:
    with answering(status) as port:
        code, said = check_health(SLIPSTREAM_HOST="0.0.0.0", SLIPSTREAM_PORT=str(port))
    assert code == expected and str(status) in said


def test_no_server_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, said = check_health(SLIPSTREAM_PORT=str(port))
    assert code == 1 and "no answer" in said


def enter(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint with a `slipstream` that prints its arguments and key."""
    command = tmp_path / "slipstream"
    command.write_text(
        '#!/bin/sh\necho "$# $*" "key=${SLIPSTREAM_API_KEY-none} file=${SLIPSTREAM_API_KEY_FILE-none}"\n'
    )
    command.chmod(0o755)
    environment = {"SLIPSTREAM_CACHE_DIR": str(tmp_path / "cache"), **environment}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([ENTRYPOINT, *arguments], env=environment, capture_output=True, text=True, timeout=20)


def test_the_entrypoint_passes_arguments_on(tmp_path: Path) -> None:
    done = enter(tmp_path, "serve", "org/name", "--set", "a=b c")
    assert (done.returncode, done.stdout) == (0, "4 serve org/name --set a=b c key=none file=none\n")
    assert (tmp_path / "cache").is_dir()


def test_the_entrypoint_reads_the_key_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret words\n")
    done = enter(tmp_path, "serve", SLIPSTREAM_API_KEY_FILE=str(tmp_path / "key"))
    assert done.stdout == "1 serve key=secret words file=none\n"
    missing = enter(tmp_path, "serve", SLIPSTREAM_API_KEY_FILE=str(tmp_path / "nowhere"))
    assert missing.returncode == 2 and "nowhere" in missing.stderr and not missing.stdout


def test_a_cache_that_cannot_be_written_is_told_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = enter(tmp_path, "serve", SLIPSTREAM_CACHE_DIR=str(tmp_path / "file/cache"))
    assert done.returncode == 2 and "cannot write" in done.stderr and not done.stdout
    assert enter(tmp_path, "version", SLIPSTREAM_CACHE_DIR=str(tmp_path / "file/cache")).returncode == 0
