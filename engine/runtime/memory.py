"""How large the KV pool may be, from measured memory, with an error that says what would fit."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig
from engine.errors import InsufficientMemory

# A pool nobody gave a size takes no more than this, or one sequence of full length: a server that fills a machine's
# memory because it could is a bad neighbour, and its pages have to be cleared at every start.
MEASURED_LIMIT = 4 << 30


def available_bytes(share: float = 1.0) -> int:
    """Memory that this process may still take: the machine's, or its control group's if that is less.

    Of a share of it, what this process holds is taken off: what is free now may be wanted by those who start later.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            cap = Path("/sys/fs/cgroup", limit).read_text().strip()
            used = int(Path("/sys/fs/cgroup", usage).read_text())
        except (OSError, ValueError):
            continue
        if cap.isdigit():
            available, total = min(available, max(int(cap) - used, 0)), min(total, int(cap))
    return available if share == 1 else max(min(available, int(total * share) - resident_bytes("VmRSS")), 0)


def resident_bytes(field: str = "VmHWM") -> int:
    """Resident memory of this process: the peak so far, or with "VmRSS" what it is now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def activation_bytes(config: EngineConfig, hidden: int, intermediate: int, vocab_size: int) -> int:
    """Upper estimate of one step's temporary tensors: a few rows per token, and four copies of the logits, in fp32."""
    tokens, seqs = config.scheduler.max_batched_tokens, config.scheduler.max_num_seqs
    return 4 * (tokens * (8 * hidden + 4 * intermediate) + 4 * min(seqs, tokens) * vocab_size)


def measured_budget(config: EngineConfig, total: int, free: int, own: int) -> int:
    """What a pool without a wished size and one step may take of a device with `total` bytes, `free` of them free.

    `own` is what this process holds already. A model's share counts its weights; what others hold stays theirs.
    """
    share = total * config.kv.utilization * config.model.share
    return int(min(share - own, free - total * (1 - config.kv.utilization)))


def plan_pool(
    config: EngineConfig,
    bytes_per_block: int,
    declared_len: int,
    available: int,
    reserve: int,
    measured: int | None = None,
) -> tuple[int, int]:
    """(number of blocks, max_model_len) for a model that declares a context of `declared_len` tokens.

    `available` bytes, of the model's share, are free after the weights, `reserve` of them are for one step. `measured`
    is what a pool that nobody gave a size takes; None is for a host's memory, which others need too: there it has a
    limit. A size that was given is for the pools of all models together.
    Without a wish in the configuration the context is cut to what one sequence can hold. With one, too little
    memory raises InsufficientMemory, which says how much is missing and which settings would fit.
    """
    block_size = config.kv.block_size
    wanted = config.model.max_model_len
    if wanted is not None and wanted > declared_len:
        raise InsufficientMemory(f"models.max_model_len: {wanted} is more than the model's own {declared_len} tokens")
    length = wanted or declared_len
    one_sequence = -(-length // block_size) * bytes_per_block
    asked, share = config.kv.memory_bytes, config.model.share
    budget = None if asked is None else int(asked * share)
    if budget is None and measured is not None:
        budget = measured
    elif budget is None:
        budget = int(available * config.kv.utilization - reserve)
        budget = min(budget, max(MEASURED_LIMIT, one_sequence))
    elif budget > available - reserve:
        raise InsufficientMemory(
            f"kv.memory asks for {_mib(budget)}, but only {_mib(available - reserve)} are free after the weights and "
            f"{_mib(reserve)} for one step; set kv.memory to {_mib(max(available - reserve, 0), share)} or less"
        )
    useful = -(-length // block_size) * config.scheduler.max_num_seqs
    blocks = min(budget // bytes_per_block, useful) if budget > 0 else 0
    fits = blocks * block_size
    if fits < min(length, 2 * block_size) or (wanted is not None and fits < wanted):
        raise InsufficientMemory(
            f"the KV pool has room for {max(fits, 0)} tokens ({_mib(max(budget, 0))}), but one sequence of {length} "
            f"tokens needs {_mib(one_sequence)}: {_mib(one_sequence - max(budget, 0))} are missing. "
            f"These settings would fit: kv.memory={_mib(one_sequence, share)}"
            + (f", or models.0.max_model_len={fits}" if fits >= 2 * block_size else "")
        )
    return int(blocks), min(length, fits)


def _mib(size: int, share: float = 1.0) -> str:
    """A setting that is at least `size`, or that one model's `share` of is."""
    return f"{-(-size // int((1 << 20) * share))}MiB"
