"""Where a model runs and in which numbers; how host tensors get there; and what a failed step says of the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch

from engine.attention.paged_cpu import usable
from engine.attention.sdpa import SdpaAttention
from engine.config import ModelConfig
from engine.errors import ConfigError, DeviceOutOfMemory
from engine.registry import ATTENTION
from engine.runtime import devices
from engine.runtime.batch import SeqInput, pack
from engine.runtime.devices import choose_attention, device_failure, place
from engine.runtime.linear import packing_available
from engine.runtime.transfer import ALIGNMENT, stage, to_device, views

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
PACKED = "fp16" if packing_available() else "none"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `place` asks the driver; nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, None])
def test_a_cpu_computes_in_fp32_over_packed_weights(stored: torch.dtype | None) -> None:
    placed = place(ModelConfig(), stored)
    assert (placed.device, placed.dtype, placed.quant) == (CPU, torch.float32, PACKED)
    assert placed.detail.startswith("cpu (no CUDA device), float32, weights: ")
    assert place(ModelConfig(quant="none"), stored).quant == "none"


@pytest.mark.usefixtures("no_gpu")
def test_keys_and_values_are_rounded_where_weights_are_or_it_is_asked_for() -> None:
    assert place(ModelConfig(quant="none"), None).pool is torch.float32
    assert place(ModelConfig(quant="none"), None, "fp16").pool is torch.float16
    coarse = place(ModelConfig(quant="int8"), None)
    assert coarse.pool is (torch.float16 if coarse.quant == "int8" else torch.float32)
    assert place(ModelConfig(quant="int8"), None, "fp32").pool is torch.float32
    with pytest.raises(ConfigError, match=r"kv\.dtype: fp16 is for models in float32 on a CPU"):
        place(ModelConfig(dtype="bfloat16"), None, "fp16")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_taken_where_there_is_one_and_keeps_16_stored_bits() -> None:
    for stored, expected in (
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (None, torch.bfloat16),
    ):
        placed = place(ModelConfig(), stored)
        assert (placed.device, placed.dtype, placed.quant) == (torch.device("cuda", 0), expected, "none")
    assert placed.detail == "cuda:0 (Some GPU), bfloat16 (stored as None), weights: none"
    assert place(ModelConfig(device="cuda:1", dtype="float32"), None).device == CUDA
    assert place(ModelConfig(device="cpu"), torch.bfloat16).dtype is torch.float32


@pytest.mark.usefixtures("two_gpus")
def test_packed_linears_asked_for_on_a_gpu_are_said_to_be_none(caplog: pytest.LogCaptureFixture) -> None:
    assert place(ModelConfig(quant="fp16"), torch.bfloat16).quant == "none"
    assert "models.quant" in caplog.text and "x86 CPU" in caplog.text


@pytest.mark.usefixtures("two_gpus")
def test_a_device_past_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\.device: 'cuda:2' was asked for, but there are 2 devices"):
        place(ModelConfig(device="cuda:2"), None)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\.device: 'cuda' was asked for, but torch .* finds no CUDA device"):
        place(ModelConfig(device="cuda"), None)


def test_16_bits_on_a_cpu_are_slow_and_exclude_packing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        placed = place(ModelConfig(device="cpu", dtype="bfloat16"), None)
    assert (placed.dtype, placed.quant) == (torch.bfloat16, "none") and "slower than float32" in caplog.text
    with pytest.raises(ConfigError, match=r"models\.quant: fp16 packs .* set models\.quant to none"):
        place(ModelConfig(device="cpu", dtype="bfloat16", quant="fp16"), None)


# ---- attention -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fast(SdpaAttention):
    """A backend that runs."""


def broken() -> None:
    raise OSError("no C compiler\nand more")


BEST = {"cpu": "paged_cpu", "cuda": "triton_paged"}


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_attention_takes_the_fastest_that_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    best = BEST[device.type]
    monkeypatch.setattr(devices, "_USABLE", {})
    monkeypatch.setitem(ATTENTION, best, f"{__name__}:Fast")
    backend, why = choose_attention("auto", device, torch.float32)
    assert isinstance(backend, Fast) and why == best
    monkeypatch.setitem(ATTENTION, best, f"{__name__}:broken")
    backend, why = choose_attention("auto", device, torch.float32)
    assert type(backend) is SdpaAttention and why == f"sdpa ({best}: no C compiler)"
    monkeypatch.delitem(ATTENTION, best)
    assert choose_attention("auto", device, torch.float32)[1] == "sdpa"


def test_native_attention_is_chosen_for_what_it_has_code_for() -> None:
    expected = "paged_cpu" if usable(CPU, torch.float32) else "sdpa (paged_cpu: no native code here for torch.float32)"
    assert choose_attention("auto", CPU, torch.float32)[1] == expected
    backend, why = choose_attention("auto", CPU, torch.bfloat16)
    assert type(backend) is SdpaAttention and why == "sdpa (paged_cpu: no native code here for torch.bfloat16)"


def test_attention_by_name_is_that_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("sdpa", CPU, torch.float32)[1] == "sdpa"
    monkeypatch.setitem(ATTENTION, "paged_cpu", f"{__name__}:broken")
    with pytest.raises(OSError, match="no C compiler"):
        choose_attention("paged_cpu", CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"unknown attention backend 'sdpaa'; known: .*sdpa"):
        choose_attention("sdpaa", CPU, torch.float32)


# ---- host tensors onto a device ----------------------------------------------------------------------------


def test_staged_parts_come_out_as_they_went_in_and_aligned() -> None:
    parts = (
        torch.tensor([1, -(2**62), 3]),
        torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)[:, 1:],  # not contiguous
        torch.empty(0, 7, dtype=torch.int32),
        torch.tensor([1.5, float("nan")]),
        torch.tensor(7),
        torch.tensor([True, False]),
    )
    buffer, offsets = stage(parts, pin=False)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    for part, view in zip(parts, views(buffer, parts, offsets), strict=True):
        assert view.dtype == part.dtype and view.is_contiguous()
        torch.testing.assert_close(view, part, rtol=0, atol=0, equal_nan=True)
    assert stage((), pin=False)[0].numel() == 0


def test_on_a_cpu_nothing_is_copied() -> None:
    part = torch.arange(3)
    assert to_device([part], CPU)[0] is part


def test_a_packed_batch_survives_staging() -> None:
    batch = pack([SeqInput([1, 2, 3], 4, (5, 6), 7), SeqInput([9], 0, (2,), 1)], 4, CPU)
    tensors = (batch.ids, batch.positions, batch.slots, batch.query_starts, batch.kv_lens, batch.block_tables)
    buffer, offsets = stage(tensors, pin=False)
    assert all(torch.equal(a, b) for a, b in zip(tensors, views(buffer, tensors, offsets), strict=True))


# ---- what fails in a step ------------------------------------------------------------------------------------


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    found = device_failure(caught.value, CPU)
    assert isinstance(found, DeviceOutOfMemory) and "does not fit into the memory of cpu" in str(found)
    assert isinstance(device_failure(torch.OutOfMemoryError("CUDA out of memory."), CUDA), DeviceOutOfMemory)
    assert isinstance(device_failure(MemoryError(), CPU), DeviceOutOfMemory)
    assert device_failure(RuntimeError("shapes do not fit"), CPU) is None
