"""Every file in configs/ starts and answers; with tiny models in place of its own, on a CPU."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.models.fingerprint import fingerprint
from engine.models.verifier_head import HeadSpec, save_head, tensor_shapes
from tests.e2e.conftest import setting_arguments
from tests.e2e.process import ROOT, ServerProcess
from tests.e2e.wire import complete, error_of, get, post
from tests.tiny_diffusion import save_tiny_diffusion

BEYOND = {"ensemble": {"target_weight": 0.0}, "bounded": {"epsilon": 1.0}, "diversed": {"min_weight": 0.0}}


@pytest.fixture(scope="module")
def head_folder(tiny_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head for the tiny pair that says 0.5 everywhere."""
    widths = [json.loads((folder / "config.json").read_text())["hidden_size"] for folder in (tiny_folder, draft_folder)]
    spec = HeadSpec(widths[0], widths[1], 4, fingerprint(tiny_folder), fingerprint(draft_folder), "none")
    folder = tmp_path_factory.mktemp("heads") / "head"
    save_head(folder, spec, {name: torch.zeros(shape) for name, shape in tensor_shapes(spec).items()})
    return folder


@pytest.fixture(scope="module")
def diffusion_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full-attention and a block-causal model with one tokenizer."""
    folder = tmp_path_factory.mktemp("diffusion")
    return {name: save_tiny_diffusion(f"a2d_llama_{name}", folder / name) for name in ("full", "block")}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_file_starts_and_answers(
    file: Path, tiny_folder: Path, draft_folder: Path, head_folder: Path, diffusion_folders: dict[str, Path]
) -> None:
    model = yaml.safe_load(file.read_text(encoding="utf-8"))["models"][0]
    draft, verifier, diffusion = model.get("draft"), model.get("verifier", {}), model.get("diffusion")
    path = tiny_folder if diffusion is None else diffusion_folders["full"]
    changes = {"path": path, "max_model_len": "null", "device": "auto", "attention": "auto", "dtype": "auto"}
    if draft is not None and "path" in draft:
        changes |= {"draft.path": draft_folder, "draft.max_draft": "null"}
    if diffusion is not None and "drafter" in diffusion:
        changes |= {"diffusion.drafter": diffusion_folders["block"]}
    if "head" in verifier:
        changes |= {"verifier.head": head_folder}
    settings = [*(f"models.0.{key}={value}" for key, value in changes.items()), "kv.memory=8MiB"]
    with ServerProcess("--config", str(file), *setting_arguments(*settings)) as server:
        assert complete(server.wait_ready().url, "hello", ignore_eos=True)
        entry = get(server.url, "/v1/models").json()["data"][0]
        card = entry["speculation"]
        check_denoised(server.url, diffusion, entry["diffusion"])
        assert (card is None) == (draft is None)
        assert card is None or card["draft"] == (draft_folder.name if "path" in draft else None)
        assert card is None or card["verifier"] == verifier["name"]
        if "knobs" in verifier:
            check_relaxed(server.url, verifier)
        server.assert_clean_end(signal.SIGINT, group=True)


def check_denoised(url: str, diffusion: dict[str, Any] | None, card: dict[str, Any] | None) -> None:
    """A model that denoises does it as its file says; any other one does not."""
    assert (card is None) == (diffusion is None)
    if card is None or diffusion is None:
        return
    drafter = {"drafter": "block"} if "drafter" in diffusion else {}
    assert card | diffusion | drafter == card
    body = {"prompt": "hello", "ignore_eos": True, "max_tokens": 12, "diffusion": {"report": True}}
    told = post(url, "/v1/completions", body).json()["diffusion"]
    assert told | {name: diffusion[name] for name in told.keys() & diffusion.keys() - {"canvas"}} == told
    assert told["forwards"] and bool(told["draft_forwards"]) == bool(drafter) == bool(told["verifies"])


def check_relaxed(url: str, verifier: dict[str, Any]) -> None:
    """Answers say what they are, and no request goes past the ceiling."""
    body: dict[str, Any] = {"prompt": "hello", "ignore_eos": True}
    report = post(url, "/v1/completions", body).json()["speculation"]
    assert (report["verifier"], report["knobs"], report["lossy"]) == (verifier["name"], verifier["knobs"], True)
    assert 0 <= report["bias"] <= report["bias_bound"] <= verifier["max_bias"] < 1
    (wish,) = BEYOND[verifier["name"]].items()
    refused = error_of(post(url, "/v1/completions", {**body, "speculation": dict([wish])}))
    assert refused["param"] == f"speculation.{wish[0]}"
    assert f"by {verifier['max_bias']:g} at most" in refused["message"]
    assert error_of(post(url, "/v1/completions", {**body, "speculation": {"verifier": "typical"}}))
