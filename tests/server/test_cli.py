"""The `slipstream` command: its table, its configuration, its start-up table, and errors that are one line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from engine.config import DiffusionConfig, DraftConfig, VerifierConfig, load
from engine.errors import SlipstreamError
from engine.registry import RULES, VERIFIERS
from server import cli, launch
from server.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]


def test_help_names_every_command_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    code = "import sys; from server.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    modules = set(done.stdout.splitlines()[-1].split())
    assert not modules & {"argparse", "yaml", "httpx", "pydantic", "fastapi", "asyncio"}


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if " " in name])
def test_a_groups_command_explains_itself_without_torch(name: str) -> None:
    code = f"from server.cli import main; main({[*name.split(), '--help']})"
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"usage: slipstream {name}" in done.stdout and "argparse" in done.stdout.splitlines()[-1]
    assert not set(done.stdout.splitlines()[-1].split()) & {"torch", "transformers", "matplotlib"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_resolves_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main([*name.split(), "--help"])
    except SystemExit as leaving:  # argparse
        code = leaving.code
    captured = capsys.readouterr()
    assert code == (2 if name == "version" else 0)
    assert f"usage: slipstream {name}" in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: slipstream COMMAND"),
        (["sevre"], "no command 'sevre'"),
        (["bench"], "usage: slipstream bench COMMAND"),
        (["bench", "stop"], "no command 'bench stop'"),
        (["ben"], "no command 'ben'"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_a_groups_help_shows_its_own_commands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "  bench step " in shown and "  serve " not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == cli.main(["version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("slipstream")


# ---- configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_print_config_shows_what_serve_would_use(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = ["--set", "kv.block_size=8", "--host", "::1", "--port", "0", "--set", "server.max_n=3"]
    assert cli.main(["print-config", "--config", str(file), *changes]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    read, meant = load(printed), load(file, ("kv.block_size=8",))
    assert read.engines() == meant.engines()
    expected = load_settings({**meant.server, "max_n": 3}, host="::1", port=0)
    assert load_settings(read.server) == expected


def test_print_config_hides_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "sk-secret-1")
    assert cli.main(["print-config", "--set", "server.api_keys=[sk-secret-2, sk-secret-3]"]) == 0
    shown = capsys.readouterr().out
    assert "sk-secret" not in shown
    assert len(yaml.safe_load(shown)["server"]["api_keys"]) == 2


@pytest.mark.parametrize("model", ["/models/a: b", "123", "org/Name-7B", "it's", "null"])
def test_model_takes_the_place_of_the_files_first_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["print-config", model, "--config", "configs/exact.yaml"]) == 0
    first = yaml.safe_load(capsys.readouterr().out)["models"][0]
    assert (first["path"], first["id"], first["quant"]) == (model, "", "none")


def test_set_wins_over_model_and_environment_over_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_PORT", "9001")
    assert cli.main(["print-config", "m", "--set", "models.0.id=mine", "--config", "configs/demo.yaml"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["models"][0]["id"], shown["server"]["port"]) == ("mine", 9001)


def drafts_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """What of the first model is about drafts."""
    assert cli.main(["print-config", *arguments]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["models"][0]
    return {name: model[name] for name in ("path", "pipeline", "draft", "verifier")}


@pytest.mark.parametrize(
    ("arguments", "quant"),
    [
        ([], "auto"),
        (["--quant", "int8"], "int8"),
        (["--config", "configs/demo-int4.yaml"], "int4"),
        (["--config", "configs/dflash-int8.yaml", "--quant", "none"], "none"),
        (["--quant", "int4", "--set", "models.0.quant=fp16"], "fp16"),
    ],
)
def test_the_format_of_weights(arguments: list[str], quant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["print-config", *arguments]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["models"][0]["quant"] == quant


ON_NGRAM = ["--config", "configs/ngram.yaml"]


@pytest.mark.parametrize(
    ("arguments", "draft", "verifier"),
    [
        (["--draft", "ngram"], {}, "strict"),
        (["--draft", "ngram", "--max-draft", "3", "--verifier", "rejection"], {"max_draft": 3}, "rejection"),
        (["--draft", "./ngram"], {"drafter": "auto", "path": "./ngram"}, "strict"),
        (["--draft", "it's: a", "--draft-tree", "9"], {"drafter": "auto", "path": "it's: a", "tree": 9}, "strict"),
        (["--draft", "null"], {"drafter": "auto", "path": "null"}, "strict"),
        (["--draft", "d", "--set", "models.0.draft.drafter=eagle3", "--set", "models.0.draft.sample=true"],
         {"drafter": "eagle3", "path": "d", "sample": True}, "strict"),
        (ON_NGRAM, {"max_draft": 8}, "strict"),
        ([*ON_NGRAM, "--max-draft", "2"], {"max_draft": 2}, "strict"),
        ([*ON_NGRAM, "--draft", "a/b"], {"drafter": "auto", "path": "a/b", "max_draft": 8}, "strict"),
        (["--config", "configs/demo.yaml", "--draft", "a/b"], {"drafter": "auto", "path": "a/b"}, "strict"),
    ],
)  # fmt: skip
def test_what_drafts(
    arguments: list[str], draft: dict[str, object], verifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drafts_of(arguments, capsys) == {
        "path": "demo",
        "pipeline": "speculative",
        "draft": {**asdict(DraftConfig()), **draft},
        "verifier": {**asdict(VerifierConfig()), "name": verifier},
    }


def test_what_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--draft", "d", "--verifier", "diversed", "--verifier-head", "it's: a", "--max-bias", "0.25"]
    verifier = {"name": "diversed", "knobs": {}, "head": "it's: a", "max_bias": 0.25}
    assert drafts_of(arguments, capsys)["verifier"] == verifier
    knobs = ["--set", "models.0.verifier.knobs.min_weight=0.75"]
    assert drafts_of([*arguments, *knobs], capsys)["verifier"] == {**verifier, "knobs": {"min_weight": 0.75}}


@pytest.mark.parametrize(
    ("arguments", "pipeline", "diffusion"),
    [
        (["--rule", "frechet"], "autoregressive", {"rule": "frechet"}),
        (["--cache", "dual", "--canvas", "64"], "autoregressive", {"cache": "dual", "canvas": 64}),
        (["--diffusion-drafter", "it's: a"], "dual_diffusion", {"drafter": "it's: a"}),
        (["--config", "configs/fast-dllm-plus.yaml", "--canvas", "32"], "masked_diffusion",
         {"rule": "frechet", "knobs": {"delta": 0.25}, "cache": "dual", "block_length": 32, "canvas": 32}),
    ],
)  # fmt: skip
def test_what_denoises(
    arguments: list[str], pipeline: str, diffusion: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["print-config", *arguments]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["models"][0]
    assert (model["pipeline"], model["diffusion"]) == (pipeline, {**asdict(DiffusionConfig()), **diffusion})


def test_the_help_names_every_verifier_and_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name in (*VERIFIERS, *RULES) if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("command", ["serve", "print-config"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no/such.yaml"], "no/such.yaml: No such file"),
        (["--set", "kv.memroy=1"], "kv.memroy: unknown key"),
        (["--set", "server.prot=1"], "server.prot: unknown key"),
        (["--port", "70000"], "server.port: "),
        (["--set", "models.0.quant=int1"], "models.quant: 'int1'"),
        (["--quant", "int3"], "models.quant: 'int3' is not one of auto, none, fp16, int8, int4, fp8"),
        (["--config", "configs/demo.yaml", "--quant", ""], "models.quant: '' is not one of auto, none, fp16"),
        (["--draft", ""], "--draft: expected `ngram`, or the folder or hub id"),
        (["--max-draft", "3"], "models.draft: the pipeline 'autoregressive' does not draft; say"),
        (["--verifier", "rejection"], "models.verifier: the pipeline 'autoregressive' verifies nothing; say"),
        (["--draft", "x", "--max-draft", "0"], "models.draft.max_draft: 0 is not in 1 to 64"),
        (["--draft", "x", "--max-bias", "1.5"], "models.verifier.max_bias: 1.5 is not in [0, 1]"),
        (["--draft", "x", "--max-bias", "nan"], "models.0.verifier.max_bias: expected float"),
        (["--max-bias", "0.5"], "models.verifier: the pipeline 'autoregressive' verifies nothing; say"),
        (["--draft", "x", "--set", "models.0.verifier.knobs.epsilon=a"], "verifier.knobs.epsilon: expected a number"),
        (["--draft", "x", "--set", "models.0.verifier.epsilon=1"], "models.0.verifier.epsilon: unknown key; known:"),
        (["--draft", "ngram", "--draft-tree", "8"], "models.draft.tree: the drafter 'ngram' drafts no trees"),
        (
            ["--draft", "ngram", "--rule", "quota"],
            "models.diffusion: the pipeline 'speculative' does not denoise; leave",
        ),
        (["--canvas", "0"], "models.diffusion.canvas: 0 is not in 1 to 1048576"),
        (["--cache", "radix"], "models.diffusion.cache: 'radix' is not one of none, prefix, dual, block"),
        (
            ["--set", "models.0.diffusion.drafter_steps=8"],
            "models.diffusion: the pipeline 'autoregressive' does not draft; drafter, drafter_steps, verify and",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_2(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("slipstream: ") and message in captured.err


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = f"{shlex.quote(sys.executable)} -m server print-config | true"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


# ---- what can go wrong at the start ----------------------------------------------------------------------


def test_listen_takes_the_port_at_once() -> None:
    sockets = launch.listen("localhost", 0)
    ports = {taken.getsockname()[1] for taken in sockets}
    try:
        assert len(ports) == 1 and 0 not in ports
        with pytest.raises(SlipstreamError, match=r"cannot listen on 127\.0\.0\.1 port \d+: Address already in use"):
            launch.listen("127.0.0.1", ports.pop())
    finally:
        for taken in sockets:
            taken.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_listen_on_what_is_not_ours(host: str) -> None:
    with pytest.raises(SlipstreamError, match=f"cannot listen on {host} port 0: .*--host"):
        launch.listen(host, 0)


def test_serve_says_in_one_line_why_a_model_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    command = [sys.executable, "-m", "server", "serve", str(tmp_path / "broken.gguf"), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("slipstream: ") and "Traceback" not in done.stderr
    assert "curl" not in done.stdout


@pytest.mark.parametrize("draft", ["no/draft", "tests/server"])
def test_serve_says_in_one_line_why_a_draft_cannot_be_used(draft: str) -> None:
    command = [sys.executable, "-m", "server", "serve", "--draft", draft, "--port", "0"]
    environment = {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("slipstream: models.draft.path: ") and draft in last and "Traceback" not in done.stderr
