"""Every file in configs/ starts and answers; with tiny models in place of its own, on a CPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import setting_arguments
from tests.e2e.process import ROOT, ServerProcess
from tests.e2e.wire import complete, get


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_file_starts_and_answers(file: Path, tiny_folder: Path, draft_folder: Path) -> None:
    model = yaml.safe_load(file.read_text(encoding="utf-8"))["models"][0]
    draft = model.get("draft")
    changes = {"path": tiny_folder, "max_model_len": "null", "device": "auto", "attention": "auto", "dtype": "auto"}
    if draft is not None and "path" in draft:
        changes |= {"draft.path": draft_folder, "draft.max_draft": "null"}
    settings = [*(f"models.0.{key}={value}" for key, value in changes.items()), "kv.memory=8MiB"]
    with ServerProcess("--config", str(file), *setting_arguments(*settings)) as server:
        assert complete(server.wait_ready().url, "hello", ignore_eos=True)
        card = get(server.url, "/v1/models").json()["data"][0]["speculation"]
        assert (card is None) == (draft is None)
        assert card is None or card["draft"] == (draft_folder.name if "path" in draft else None)
        server.assert_clean_end(signal.SIGINT, group=True)
