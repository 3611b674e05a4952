"""Sets peers up in a folder of the user's: a virtual environment for each, and the weights in the format it reads."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.catalog import ENVIRONMENTS, PEERS, Weights
from benchmarks.peers.gguf_weights import FORMATS, rewrite
from benchmarks.stream import BenchmarkError
from engine.hub.resolve import find_demo, resolve

_BARE: Mapping[Weights, Weights] = {"openvino-gguf": "gguf", "openvino-f16": "f16", "openvino-q8_0": "q8_0"}
END_FIELDS = ("eos_token_id", "stop_strings")


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything of the peers lies. `venvs` are environments that the user has already, by their name."""

    folder: Path
    cache_dir: Path
    venvs: Mapping[str, Path] = field(default_factory=dict)

    def python(self, environment: str) -> Path:
        return self.venvs.get(environment, self.folder / environment / "venv") / "bin" / "python"


def install(name: str, place: Place, torch_index: str) -> None:
    """Make an environment and run its steps; what is there already is left to pip. Raises BenchmarkError."""
    if name in place.venvs:
        return
    environment, home = ENVIRONMENTS[name], place.folder / name / "venv"
    if not place.python(name).exists():
        say(f"{name}: a new environment in {home}")
        venv.create(home, with_pip=True)
    for number, step in enumerate(environment.steps):
        index = ("--no-deps", "--index-url", torch_index) if environment.torch and not number and torch_index else ()
        say(f"{name}: pip {' '.join(step)}")
        command = [str(place.python(name)), "-m", "pip", "--disable-pip-version-check", *step, *index]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise BenchmarkError(f"{name}: {' '.join(command)} failed:\n{done.stdout[-3000:]}")


def installed_version(name: str, place: Place) -> str:
    """The version of the peer's package. Raises BenchmarkError where it is not set up."""
    package = ENVIRONMENTS[name].package
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run([place.python(name), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        peers = " ".join(peer for peer, about in PEERS.items() if about.environment == name)
        raise BenchmarkError(f"{package} is not set up; run: python -m benchmarks.peers setup {peers}") from None
    return done.stdout.strip()


def weights(kind: Weights, model: str, place: Place) -> Path:
    """The model in the form that a peer reads, made if it is not there yet. Raises BenchmarkError."""
    if kind in ("folder", "endless"):
        folder = resolve(model, place.cache_dir)
        return folder if kind == "folder" else _endless(folder, place.folder / "weights" / f"{folder.name}-endless")
    source = find_demo() if model == "demo" else Path(model).expanduser()
    if kind.startswith("openvino-"):
        return _openvino(kind, weights(_BARE[kind], model, place), place.folder / "weights")
    if source.suffix.lower() != ".gguf":
        raise BenchmarkError(f"llama.cpp reads GGUF files, and the model of this configuration is {model!r}")
    if kind == "gguf":
        return source
    assert kind in FORMATS
    target = place.folder / "weights" / f"{source.stem}.{kind}.gguf"
    if not target.exists():
        say(f"writing {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        rewrite(source, target, kind)
    return target


def _openvino(kind: Weights, source: Path, folder: Path) -> Path:
    """The file in a folder of its own: the library puts what it makes of a file beside it."""
    target = folder / f"{source.stem}-{kind}" / "model.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.symlink_to(source)
    return target


def _endless(folder: Path, target: Path) -> Path:
    """The same model without an end of sequence: it goes on to max_tokens, which is what is measured."""
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        copy = target / file.name
        copy.unlink(missing_ok=True)
        if file.name in ("config.json", "generation_config.json"):
            fields = json.loads(file.read_text(encoding="utf-8"))
            kept = {name: value for name, value in fields.items() if name not in END_FIELDS}
            copy.write_text(json.dumps({**kept, "eos_token_id": None}), encoding="utf-8")
        else:
            copy.symlink_to(file.resolve())
    return target


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
