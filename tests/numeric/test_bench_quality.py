"""What `benchmarks.quality` says of a format, against sums written out here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality_measures import BLOCK, Reader, Reading, parting, read
from benchmarks.quality_texts import Window
from engine.config import ModelConfig
from engine.runtime.loading import load_checked
from tests.tiny import save_tiny


def test_a_reading_is_perplexity_divergence_and_first_choices() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log() + 3.0  # logits need not be normed
    other = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]]).log()
    reading = Reading()
    reading.add(reference[:1], other[:1], torch.tensor([0]))
    reading.add(reference[1:], other[1:], torch.tensor([1]))
    found = reading.figures()
    divergences = (0.5 * math.log(2) - 0.25 * math.log(2), 0.8 * math.log(8 / 6) - 0.2 * math.log(2))
    assert found["perplexity"] == pytest.approx(1 / math.sqrt(0.25 * 0.6))
    assert found["perplexity_change"] == pytest.approx(math.sqrt(0.5 * 0.8) / math.sqrt(0.25 * 0.6) - 1)
    assert found["divergence"] == pytest.approx(sum(divergences) / 2)
    assert found["worst_divergence"] == pytest.approx(max(divergences))
    assert (found["same_argmax"], found["positions"]) == (0.5, 2)


def test_where_answers_part() -> None:
    wanted = [(1, 2, 3, 4), (5, 6, 7, 8), (9, 9)]
    found = parting(wanted, [(1, 2, 3, 4), (5, 6, 0, 8), (9,)])
    assert found == {"answers": 3, "equal": 1, "agreed_tokens": 0.7, "first_difference": 2.0}
    assert parting(wanted, wanted)["first_difference"] == -1.0


def test_a_model_read_in_chunks_beside_itself_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality_measures.CHUNK", 7)
    folder = save_tiny("llama", tmp_path / "model")
    config = ModelConfig(str(folder), device="cpu", quant="none", attention="sdpa")
    loaded = load_checked(config, folder, lambda _: None)
    windows = [Window("a", tuple(range(1, BLOCK + 4))), Window("b", tuple(range(5, 15)))]
    readers = [Reader(loaded, BLOCK + 4, dtype) for dtype in (torch.float32, torch.float32)]
    (found,) = read(readers[0], readers[1:], windows)
    assert {name: reading.positions for name, reading in found.items()} == {"": 27, "a": 18, "b": 9}
    figures = found[""].figures()
    assert figures["divergence"] == pytest.approx(0, abs=1e-9) and figures["same_argmax"] == 1.0
    # The same perplexity as from a plain pass of the published code over each window.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    surprise = 0.0
    for window in windows:
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            laws = plain(ids).logits[0].log_softmax(-1)
        surprise -= float(laws[:-1].gather(1, ids[0, 1:, None]).sum())
    assert figures["perplexity"] == pytest.approx(math.exp(surprise / 27), rel=1e-4)
