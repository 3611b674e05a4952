"""What `benchmarks.growth` measures: seconds of one thread over a size, without a model. No torch."""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.null_worker import InstantWorker, Script
from engine.cluster.messages import encode
from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.kv_manager import KVManager
from engine.types import DecodeTraits, Request, SamplingParams
from engine.types import Sequence as Running

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPTS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
WAITING = (10, 100, 1000, 2500, 5000, 10_000)
BLOCKS = (1000, 4000, 16_000, 64_000, 256_000, 1_000_000)
BLOCK = 16  # tokens
CHUNK = 512  # tokens of a prompt that one step takes
CHAIN = 512  # blocks of one cached prompt
STEPS = 60  # of which the fastest count: what others do to the machine makes steps slower, never faster
COSTS = tuple((n, 0.013 + 0.0002 * n) for n in (1, 4, 16, 64, 256, 1024, 4096))
PASSES = tuple((n, 0.003 + 0.0001 * n) for n in (1, 8, 32, 256, 512))
PIPELINES = {
    "plain decoding": Script(),
    "drafts for free": Script(DecodeTraits(lookahead=4, drafts=True), step_costs=COSTS),
    "drafts by a network": Script(DecodeTraits(lookahead=7, drafts=True), step_costs=COSTS, draft_costs=PASSES),
    "denoising": Script(DecodeTraits(denoises=True, unit=8)),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """`points` are (size, value) with rising sizes; values in `unit`."""

    panel: str
    name: str
    unit: str
    points: tuple[tuple[int, float], ...]


Measure = Callable[[int], float]


def curve(panel: str, name: str, unit: str, sizes: Sequence[int], measure: Measure) -> Curve:
    found = []
    for size in sizes:
        gc.collect()
        found.append((size, measure(size)))
    return Curve(panel, name, unit, tuple(found))


def scheduling_curves() -> Iterator[Curve]:
    """Planning, taking in results and building the message, for each kind of pipeline."""
    for name, script in PIPELINES.items():
        yield curve("batch", name, "us", BATCHES, partial(_step, script, 0))
    yield curve("batch", "plain decoding, one step behind", "us", BATCHES, partial(_step, Script(), 1))
    yield curve("prompt", "a step of 32 that decode", "us", PROMPTS, _decode_at)
    yield curve("prompt", "all steps of a prompt in chunks", "us", PROMPTS, partial(_prefill, found=False))
    yield curve("prompt", "starting a prompt that is cached", "us", PROMPTS, partial(_prefill, found=True))


def waiting_curves() -> Iterator[Curve]:
    """A queue behind 32 sequences that run."""
    yield curve("waiting", "adding all", "us", WAITING, lambda size: _queue(size)[0])
    yield curve("waiting", "one step meanwhile", "us", WAITING, lambda size: _queue(size)[1])
    yield curve("waiting", "aborting all", "us", WAITING, lambda size: _queue(size)[2])


def cache_curves() -> Iterator[Curve]:
    """A prefix cache that fills the pool: by prompts of 512 blocks."""
    measured = {size: _cache(size) for size in BLOCKS}
    for i, name in enumerate(("inserting all", "finding all", "evicting all")):
        yield Curve("cache", name, "us", tuple((size, found[i]) for size, found in measured.items()))
    yield curve("memory", "of the pool and its index", "MB", BLOCKS, _memory)


def request(number: int, prompt: int, max_tokens: int = 100_000, first: int | None = None) -> Request:
    """Its prompt differs from others' in the first token, `number` if not given, so that it shares no blocks."""
    ids = (number if first is None else first, *range(1, prompt))
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=(49_999,))
    return Request(f"cmpl-{number:032x}-0", ids, sampling, arrival=float(number))


def _core(script: Script, sequences: int, prompt: int, lag: int = 0) -> tuple[EngineCore, InstantWorker]:
    """An engine in which so many sequences run."""
    blocks = sequences * (prompt // BLOCK + 120) + 64
    sized = Script(
        script.traits, blocks, BLOCK, prompt + 4000, step_costs=script.step_costs, draft_costs=script.draft_costs
    )
    worker = InstantWorker(sized)
    config = SchedulerConfig(max_num_seqs=sequences, max_batched_tokens=max(CHUNK, 16 * sequences), lag=lag)
    core = EngineCore(worker, EngineConfig(scheduler=config))
    for number in range(sequences):
        core.add(request(number, prompt))
    while core.stats().waiting or core.step().stats.step_tokens > 16 * sequences:
        core.step()
    for _ in range(8):
        core.step()
    return core, worker


def _fastest(core: EngineCore, worker: InstantWorker, steps: int = STEPS) -> float:
    """Microseconds of a step: the fifth percentile."""
    found = []
    for _ in range(steps):
        worker.seconds, began = 0.0, time.thread_time()
        encode(core.step())
        found.append(time.thread_time() - began - worker.seconds)
    return 1e6 * sorted(found)[steps // 20]


def _step(script: Script, lag: int, sequences: int) -> float:
    return _fastest(*_core(script, sequences, 64, lag))


def _decode_at(prompt: int) -> float:
    return _fastest(*_core(Script(), 32, prompt))


def _prefill(prompt: int, *, found: bool) -> float:
    """Microseconds of all steps up to the first token of one prompt; `found`: another request has computed it."""
    sized = Script(num_blocks=8 * (prompt // BLOCK + 1), max_model_len=prompt + 16)
    worker = InstantWorker(sized)
    core = EngineCore(worker, EngineConfig(scheduler=SchedulerConfig(max_num_seqs=1, max_batched_tokens=CHUNK)))
    spent = []
    for number in range(6):
        asked = request(number, prompt, max_tokens=1, first=0 if found else number)
        worker.seconds, began = 0.0, time.thread_time()
        core.add(asked)
        while core.has_work():
            encode(core.step())
        spent.append(time.thread_time() - began - worker.seconds)
    return 1e6 * min(spent[1:])


def _queue(waiting: int) -> tuple[float, float, float]:
    """Microseconds to add so many requests, of a step meanwhile, and to abort them (with the step that tells of it)."""
    core, worker = _core(Script(), 32, 64)
    asked = [request(1000 + number, 64) for number in range(waiting)]
    began = time.thread_time()
    for one in asked:
        core.add(one)
    added = time.thread_time() - began
    step = _fastest(core, worker)
    worker.seconds, began = 0.0, time.thread_time()
    core.abort([one.id for one in asked])
    encode(core.step())
    aborted = time.thread_time() - began - worker.seconds
    return 1e6 * added, step, 1e6 * aborted


def _cache(blocks: int) -> tuple[float, float, float]:
    """Microseconds to fill a pool with prompts that can be found, to find them all, and to have others evict them."""
    kv = KVManager(blocks, BLOCK, bytes(16), prefix_cache=True)
    count = blocks // CHAIN or 1
    size = blocks // count * BLOCK
    spent = []
    for first in (0, 0, count):
        seqs = [Running(request(number, size + 1, first=first + number)) for number in range(count)]
        began = time.thread_time()
        for seq in seqs:
            found = kv.match(seq)
            kv.admit(seq, found, size)
            seq.num_computed = size
            kv.publish(seq)
            kv.release(seq)
        spent.append(1e6 * (time.thread_time() - began))
    return spent[0], spent[1], spent[2]


def _memory(blocks: int) -> float:
    """Megabytes of a pool in which every block is free and can be found."""
    digests = [number.to_bytes(16, "little") for number in range(blocks)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    pool = BlockPool(blocks)
    for digest in digests:
        block = pool.take()
        pool.publish(block, digest)
        pool.release(block)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return (used + sum(map(sys.getsizeof, digests))) / 1e6
