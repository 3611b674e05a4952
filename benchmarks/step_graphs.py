"""Steps as a GPU server runs them: captured, from state on the device, launched before the last results are read.

A case's time is that between the results of two steps, once they follow one another: what a server with `lag: 1` can
do at best, without its scheduler. Decodes feed one token; verifies feed drafts that cost nothing; rounds draft with a
random DFlash network of the target's shape, five layers deep, and verify its whole block. Random drafts are hardly ever
right, so a round moves on by about one token: its time is what counts here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.step_cases import MOST_STEPS, Case, Effort, Figures
from benchmarks.step_parts import Parts, Work
from engine.drafters.dflash import DFlashDrafter
from engine.models.dflash.model import DFlashModel, LoadedDFlash, assemble
from engine.models.dflash.spec import DFlashSpec, DraftLayer
from engine.models.dflash.weights import tensor_shapes
from engine.runtime.batch import DeviceBatch
from engine.runtime.cuda_graphs import buckets
from engine.runtime.device_state import Bounds, DeviceState, Entry
from engine.runtime.drafts import draft_host
from engine.runtime.loading import LoadedModel
from engine.runtime.packing import weight_bytes
from engine.runtime.runner import ModelRunner
from engine.runtime.uniform_round import DeviceDraft, make_desk, verify_round
from engine.runtime.uniform_steps import Seat, UniformSteps

LAYERS = 5  # of the draft, and of the target's that it reads


@dataclass(frozen=True, slots=True)
class FreeDraft:
    """See `uniform_round.DeviceDraft`: the same token always, for nothing."""

    block_length: int = 1
    spare_blocks: tuple[int, int] = (0, 0)

    def draft_batch(self, _: DeviceBatch, anchors: torch.Tensor, count: int) -> torch.Tensor:
        return torch.zeros_like(anchors).unsqueeze(1).expand(-1, count)


class GraphBench:
    """Measures a loaded model, over a pool for each case."""

    def __init__(
        self, loaded: LoadedModel, block_size: int, temperature: float, draft_block: int, capture: bool
    ) -> None:
        self._loaded = loaded
        self._block_size = block_size
        self._temperature = temperature
        self._capture = capture
        self._draft = random_draft(loaded, draft_block) if draft_block else None

    def grid(self, batches: Sequence[int], kvs: Sequence[int], queries: Sequence[int]) -> list[Case]:
        cases = [
            Case("decode" if query == 1 else "verify", batch, query, kv, query)
            for query in queries
            for kv in kvs
            for batch in batches
        ]
        if self._draft is not None:
            query = self._draft.most + 1
            cases += [Case("round", batch, query, kv, query) for kv in kvs for batch in batches]
        return [replace(case, kind=f"captured {case.kind}") for case in cases if case.batch <= buckets(256)[-1]]

    @torch.inference_mode()
    def measure(self, case: Case, effort: Effort) -> Figures:
        count = effort.warm_up + MOST_STEPS
        room = min(case.kv + (count + 2) * case.query, self._loaded.context_length)
        each = -(-(room + case.query) // self._block_size)
        blocks = each * case.batch
        runner = self._loaded.runner(blocks + 1, self._block_size)
        for layer in runner.cache.layers:
            layer.joint.copy_(torch.randn(layer.joint.shape, device=layer.joint.device))
        rows = buckets(case.batch)[-1]
        draft = self._bound(runner, case, blocks, rows)
        bounds = Bounds(case.batch, room, max(case.query, draft.block_length if draft else 0), self._block_size, blocks)
        device = self._loaded.placement.device
        steps = UniformSteps(
            runner, bounds, device, rows=case.batch, capture=self._capture, draft=draft, most=case.query - 1
        )
        steps.prepare(least=rows)
        tables = [tuple(range(i, blocks, case.batch)) for i in range(case.batch)]  # scattered
        seconds = self._run(steps, case, tables, effort, room)
        work = self._work(runner, case, bounds)
        return Figures(
            case=case,
            ms=1e3 * statistics.median(seconds),
            lowest_ms=1e3 * min(seconds),
            highest_ms=1e3 * max(seconds),
            steps=len(seconds),
            parts_ms={"captured": 1e3 * statistics.median(seconds)},
            work=work,
        )

    def _bound(self, runner: ModelRunner, case: Case, blocks: int, rows: int) -> DeviceDraft | None:
        if case.query == 1:
            return None
        if not case.kind.endswith("round") or self._draft is None:
            return FreeDraft()
        scratch = rows * -(-self._draft.reach // self._block_size)
        follower: DFlashModel = self._draft.bind(
            blocks + 1 + scratch, self._block_size, range(blocks + 1, blocks + 1 + scratch)
        )
        runner.follow(follower)
        return DFlashDrafter(follower)

    def _run(
        self, steps: UniformSteps, case: Case, tables: Sequence[tuple[int, ...]], effort: Effort, room: int
    ) -> list[float]:
        """Seconds between the results of two steps, the second of which was launched before the first was read."""
        heat = self._temperature
        entries = [Entry(i + 1, case.kv + 1, i, 0, heat) for i in range(case.batch)]
        limit, drafts = case.query - 1, case.query > 1
        seats = [Seat(str(i), table, limit) for i, table in enumerate(tables)]
        first = [replace(seat, entry=entry) for seat, entry in zip(seats, entries, strict=True)]
        flight, seconds = steps.launch(first, drafts=drafts), []
        longest = case.kv + 1
        began = last = time.perf_counter()
        for turn in range(effort.warm_up + MOST_STEPS):
            longest += case.query
            if longest + case.query > room:
                break
            following = steps.launch(seats, drafts=drafts)
            flight.rows()
            now = time.perf_counter()
            if turn >= effort.warm_up:
                seconds.append(now - last)
            else:
                began = now
            last, flight = now, following
            if len(seconds) >= effort.least and now - began > effort.seconds:
                break
        flight.rows()
        return seconds

    def _work(self, runner: ModelRunner, case: Case, bounds: Bounds) -> Work:
        """What the target's pass does, counted in one that is not captured; a draft's weights, read once, on top."""
        device = self._loaded.placement.device
        state = DeviceState(replace(bounds, max_len=case.kv + case.query, reach=0), device)
        desk = make_desk(state, case.batch, case.query - 1)
        with Parts(runner, device) as parts:
            work = parts.step(verify_round(runner, state, desk, case.batch, case.query), 0.0).work
        if case.kind.endswith("round") and self._draft is not None:
            head = self._loaded.adapter.model.get_output_embeddings()
            size = weight_bytes(self._draft.network) + (0 if head is None else weight_bytes(head))
            work.gemm_bytes += size
            work.gemm_flops += 2.0 * size / self._loaded.placement.dtype.itemsize * case.tokens
        return work


def random_draft(loaded: LoadedModel, block: int) -> LoadedDFlash:
    """A DFlash draft of the target's shape, with random weights of its dtype, that shares its embedding and head."""
    text, host = loaded.adapter.config, draft_host(loaded)
    heads = text.num_attention_heads
    layers = loaded.adapter.num_layers
    spec = DFlashSpec(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        layers=(DraftLayer(),) * min(LAYERS, layers),
        taps=tuple(sorted({(layers - 1) * (i + 1) // (LAYERS + 1) for i in range(LAYERS)})),
        block_size=block,
        mask_token_id=text.vocab_size - 1,
        vocab_size=text.vocab_size,
        draft_vocab_size=text.vocab_size,
    )
    dtype, device = loaded.placement.dtype, loaded.placement.device
    tensors = {
        name: torch.randn(shape, dtype=dtype, device=device) * (0.02 if len(shape) > 1 else 1.0)
        for name, shape in tensor_shapes(spec).items()
    }
    return assemble(spec, tensors, host)
