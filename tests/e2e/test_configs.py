"""Every file in configs/ starts and answers; with a tiny model in place of its own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import setting_arguments
from tests.e2e.process import ROOT, ServerProcess
from tests.e2e.wire import complete


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_configuration_file_starts_and_answers(file: Path, tiny_folder: Path) -> None:
    changes = (f"models.0.path={tiny_folder}", "models.0.max_model_len=null", "kv.memory=8MiB")
    with ServerProcess("--config", str(file), *setting_arguments(*changes)) as server:
        assert complete(server.wait_ready().url, "hello", ignore_eos=True)
        server.assert_clean_end(signal.SIGINT, group=True)
