"""Sizing of the KV pool: what fits is used, what doesn't is refused with numbers that would fit."""

from __future__ import annotations

import re

import pytest

from engine.config import EngineConfig, KVConfig, ModelConfig, SchedulerConfig
from engine.errors import InsufficientMemory
from engine.runtime.memory import activation_bytes, available_bytes, measured_budget, plan_pool, resident_bytes

MIB = 1 << 20
BLOCK = 1 * MIB  # bytes of a block of 16 tokens, in these tests


def config(memory: str = "", max_len: int | None = None, share: float = 1.0, seqs: int = 64) -> EngineConfig:
    model = ModelConfig(max_model_len=max_len, memory_share=share)
    return EngineConfig(model=model, kv=KVConfig(memory=memory), scheduler=SchedulerConfig(max_num_seqs=seqs))


def test_asked_size_is_used() -> None:
    assert plan_pool(config("64MiB"), BLOCK, 512, 1000 * MIB, 10 * MIB) == (64, 512)


def test_measured_size_leaves_room_for_a_step() -> None:
    blocks, length = plan_pool(config(), BLOCK, 100_000, 1000 * MIB, 100 * MIB)
    assert (blocks, length) == (800, 800 * 16)  # 1000 * 0.9 - 100


def test_measured_size_stops_at_four_gibibytes_or_one_sequence() -> None:
    assert plan_pool(config(), BLOCK, 8192, 100_000 * MIB, 0) == (4096, 8192)
    assert plan_pool(config(), BLOCK, 160_000, 100_000 * MIB, 0) == (10_000, 160_000)


def test_pool_is_no_larger_than_all_sequences_can_use() -> None:
    assert plan_pool(config("512MiB", seqs=2), BLOCK, 64, 1000 * MIB, 0) == (8, 64)


def test_a_device_of_its_own_has_no_limit_but_what_was_measured() -> None:
    budget = measured_budget(config(), total=100_000 * MIB, free=80_000 * MIB, own=20_000 * MIB)
    assert budget == 70_000 * MIB  # 100,000 * 0.9 - 20,000
    assert plan_pool(config(), BLOCK, 8192, 80_000 * MIB, 1000 * MIB, budget - 1000 * MIB) == (512 * 64, 8192)
    assert plan_pool(config(seqs=10_000), BLOCK, 8192, 80_000 * MIB, 1000 * MIB, budget - 1000 * MIB)[0] == 69_000


def test_a_device_is_shared_with_what_others_hold_and_with_our_other_models() -> None:
    others_hold_half = measured_budget(config(), total=100 * MIB, free=50 * MIB, own=0)
    assert others_hold_half == 40 * MIB  # a tenth of the device stays free
    assert measured_budget(config(share=0.5), total=100 * MIB, free=90 * MIB, own=10 * MIB) == 35 * MIB


def test_an_asked_size_is_checked_against_a_device_too() -> None:
    with pytest.raises(InsufficientMemory, match=r"set kv\.memory to 90MiB or less"):
        plan_pool(config("2GiB"), BLOCK, 512, 100 * MIB, 10 * MIB, 1 << 40)


def test_share_divides_the_pool_between_models() -> None:
    assert plan_pool(config("64MiB", share=0.5), BLOCK, 64, 1000 * MIB, 0)[0] == 32


def test_context_is_cut_to_what_the_pool_holds() -> None:
    assert plan_pool(config("10MiB"), BLOCK, 8192, 1000 * MIB, 0) == (10, 160)


def test_wanted_context_that_does_not_fit_is_an_error_with_settings_that_would() -> None:
    with pytest.raises(InsufficientMemory, match="502MiB are missing") as caught:
        plan_pool(config("10MiB", max_len=8192), BLOCK, 8192, 1000 * MIB, 0)
    memory, length = re.search(r"kv\.memory=(\w+), or models\.0\.max_model_len=(\d+)", str(caught.value)).groups()  # type: ignore[union-attr]
    assert plan_pool(config(memory, max_len=8192), BLOCK, 8192, 1000 * MIB, 0)[1] == 8192
    assert plan_pool(config("10MiB", max_len=int(length)), BLOCK, 8192, 1000 * MIB, 0)[1] == int(length)


def test_settings_that_would_fit_are_those_of_all_models_together() -> None:
    with pytest.raises(InsufficientMemory, match="502MiB are missing") as caught:
        plan_pool(config("40MiB", max_len=8192, share=0.25), BLOCK, 8192, 1000 * MIB, 0)
    (memory,) = re.search(r"kv\.memory=(\w+)", str(caught.value)).groups()  # type: ignore[union-attr]
    assert memory == "2048MiB"
    assert plan_pool(config(memory, max_len=8192, share=0.25), BLOCK, 8192, 1000 * MIB, 0)[1] == 8192
    with pytest.raises(InsufficientMemory, match=r"asks for 200MiB, .* set kv\.memory to 180MiB or less"):
        plan_pool(config("400MiB", share=0.5), BLOCK, 512, 100 * MIB, 10 * MIB)


def test_a_share_is_of_all_memory_less_what_the_process_holds() -> None:
    assert available_bytes(1e-9) == 0
    quarter, half = available_bytes(0.25), available_bytes(0.5)
    assert quarter <= half <= available_bytes(1.0)
    assert half == 0 or quarter == 0 or quarter < half or quarter == pytest.approx(available_bytes(), rel=0.1)


def test_pool_larger_than_free_memory_is_an_error_with_a_size_that_fits() -> None:
    with pytest.raises(InsufficientMemory, match=r"set kv\.memory to 90MiB or less"):
        plan_pool(config("2GiB"), BLOCK, 512, 100 * MIB, 10 * MIB)


def test_no_memory_at_all() -> None:
    with pytest.raises(InsufficientMemory):
        plan_pool(config(), BLOCK, 512, 10 * MIB, 20 * MIB)


def test_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(InsufficientMemory, match="more than the model's own 512"):
        plan_pool(config("64MiB", max_len=1024), BLOCK, 512, 1000 * MIB, 0)


def test_measurements_are_plausible() -> None:
    assert 0 < resident_bytes() < available_bytes() < 1 << 50
    assert activation_bytes(config(), hidden=576, intermediate=1536, vocab_size=49152) > 64 * 49152 * 4
