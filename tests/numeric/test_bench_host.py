"""`python -m benchmarks.host` over few steps: every pipeline runs, and its parts are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import host, host_rig


def test_every_pipeline_is_measured_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_rig, "VOCABULARY", 300)
    monkeypatch.setattr(host_rig, "MASK", 299)
    file, threads = tmp_path / "host.json", torch.get_num_threads()
    try:
        assert host.main(["--batch", "2", "--prompt", "40", "--steps", "2", "--runs", "1", "--output", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(file.read_text())["microseconds"]
    assert set(found) == {f"{name}, greedy" for name in host.PIPELINES}
    own = {"autoregressive": {"sampler"}, "ngram": {"drafter"}, "dflash": {"drafter", "shaping", "referee"}}
    for name, parts in {**own, "masked_diffusion": {"certainty"}}.items():
        figures = found[f"{name}, greedy"]["2"]
        assert all(figures[part] > 0 for part in (*parts, "pack", "schedule", "pipeline")), name
    assert "a sequence" in capsys.readouterr().out
