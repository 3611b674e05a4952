"""A whole forward pass in one call of the C code (`step.h`): what Python checks and keeps for it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from threading import Lock

import torch

from engine.kernels import native
from engine.kernels.layout import PagedBatch, PoolLayer
from engine.kernels.native import ATTENTION, POOL_TYPES, Library
from engine.kernels.step_program import MOST_PLANS, PROGRAM, StepProgram, check_program, pack_rope, table_fields

# The structs of step.h that are made for each pool and call, field for field.
POOL = Struct("@P3q")
CALL = Struct("@12P2q")
STATE = Struct("@Pq11Q")

KINDS = ("products", "attention", "norms", "rope", "activation", "head", "waiting", "other")  # as `step.h` numbers them


class StepPools:
    """The pools of a program's layers, as the C code takes them. They must outlive the calls."""

    def __init__(self, program: StepProgram, pools: Sequence[PoolLayer]) -> None:
        assert len(pools) == len(program.layers)
        packed = []
        for layer, pool in zip(program.layers, pools, strict=True):
            joint = pool.joint
            assert joint.shape[1] == layer.shape.width
            packed.append(POOL.pack(joint.data_ptr(), joint.stride()[0], joint.shape[0], POOL_TYPES[joint.dtype]))
        self.num_slots = min(pool.joint.shape[0] for pool in pools)
        self._buffer = ctypes.create_string_buffer(b"".join(packed))
        self.address = ctypes.addressof(self._buffer)

    @staticmethod
    def fit(program: StepProgram, pools: Sequence[PoolLayer]) -> bool:
        """Whether these are pools of these layers, of a kind that the C code reads."""
        return len(pools) == len(program.layers) and all(
            native.fits_pool(pool.joint) and pool.joint.shape[1] == layer.shape.width and pool.shape == layer.shape
            for layer, pool in zip(program.layers, pools, strict=True)
        )


class NativeStep:
    """A program with its workspace, which grows to what the largest call takes. Calls come one after another."""

    def __init__(self, library: Library, program: StepProgram) -> None:
        self.program = program
        self._library = library
        check_program(program)
        plans = {plan: index for index, plan in enumerate(dict.fromkeys(layer.plan for layer in program.layers))}
        assert len(plans) <= MOST_PLANS
        ropes = [pack_rope(rope) for rope in program.ropes]
        self._layers = ctypes.create_string_buffer(b"".join(layer.pack(plans[layer.plan]) for layer in program.layers))
        self._ropes = ctypes.create_string_buffer(b"".join(ropes) or b"\0")
        table, rows, kind = table_fields(program.embedding)
        header = PROGRAM.pack(
            ctypes.addressof(self._layers),
            ctypes.addressof(self._ropes),
            0 if program.head is None else program.head.address,
            table,
            program.last.pack(),
            *(len(program.layers), len(ropes), len(plans), program.width, rows),
            *(program.embedding_scale, program.logits_scale, program.logits_softcap or 0.0),
            kind,
        )
        self._header = ctypes.create_string_buffer(header)
        state = library.step_open()
        if not state:
            raise MemoryError("no memory for the state of a step")
        self._state = state
        weakref.finalize(self, library.step_close, self._state)
        self._lock = Lock()

    def run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rows: torch.Tensor,
        batch: PagedBatch,
        pools: StepPools,
        wanted: StepWanted,
    ) -> None:
        """One pass of ids [T] at positions [T] over the pools' rows `slots` [T]; results of `rows` [R]. All int64.

        Raises IndexError for an id, position, slot, row or block that is not there, and MemoryError.
        """
        tokens = batch.num_tokens
        for vector in (ids, positions, slots):
            assert vector.shape == (tokens,) and vector.dtype is torch.int64 and vector.is_contiguous()
        assert rows.ndim == 1 and rows.dtype is torch.int64 and rows.is_contiguous()
        tables, taps = self._tables(wanted, tokens), self._taps(wanted, tokens)
        described = ATTENTION.pack(*batch.fields, *_NOTHING)
        described_at = ctypes.c_char_p(described)
        call = CALL.pack(
            ctypes.addressof(self._header),
            pools.address,
            ctypes.cast(described_at, ctypes.c_void_p).value,
            ids.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            rows.data_ptr(),
            self._rows_of(wanted.embedded, tokens),
            0 if tables is None else ctypes.addressof(tables),
            0 if taps is None else ctypes.addressof(taps),
            self._logits(wanted.logits, rows.shape[0]),
            self._rows_of(wanted.hidden, rows.shape[0]),
            rows.shape[0],
            torch.get_num_threads(),
        )
        with self._lock:
            failed = self._library.step_run(self._state, call)
        if failed:
            raise _failure(failed, pools.num_slots)

    def profile(self) -> dict[str, float]:
        """Seconds of the calling thread by kind of work since the last `reset_profile`; "calls" counts the passes."""
        _, _, *ticks, all_ticks, nanoseconds, calls = STATE.unpack(ctypes.string_at(self._state, STATE.size))
        second = nanoseconds / max(all_ticks, 1) * 1e-9
        times = {kind: count * second for kind, count in zip(KINDS, ticks, strict=True)}
        times["other"] += (all_ticks - sum(ticks)) * second
        return {**times, "calls": float(calls)}

    def reset_profile(self) -> None:
        """Count from here."""
        ctypes.memset(self._state + Struct("@Pq").size, 0, Struct("@11Q").size)

    def _rows_of(self, given: torch.Tensor | None, count: int) -> int:
        """The address of [count, width] float32, or 0."""
        if given is None:
            return 0
        assert given.shape == (count, self.program.width) and given.dtype is torch.float32 and given.is_contiguous()
        return given.data_ptr()

    def _logits(self, given: torch.Tensor | None, count: int) -> int:
        if given is None:
            return 0
        assert self.program.head is not None and given.shape == (count, self.program.head.outputs)
        assert given.dtype is torch.float32 and given.is_contiguous()
        return given.data_ptr()

    def _tables(self, wanted: StepWanted, tokens: int) -> ctypes.Array[ctypes.c_void_p] | None:
        assert (wanted.embedded is None) == (self.program.embedding is not None)
        if all(rope.cos is not None for rope in self.program.ropes):
            return None
        assert wanted.tables is not None
        found = (ctypes.c_void_p * (2 * len(self.program.ropes)))()
        for index, rope in enumerate(self.program.ropes):
            given = () if rope.cos is not None else wanted.tables[index]
            for place, table in enumerate(given):
                assert table.shape == (tokens, rope.width) and table.is_contiguous() and table.dtype is torch.float32
                found[2 * index + place] = table.data_ptr()
        return found

    def _taps(self, wanted: StepWanted, tokens: int) -> ctypes.Array[ctypes.c_void_p] | None:
        if not wanted.taps:
            return None
        found = (ctypes.c_void_p * len(self.program.layers))()
        for layer, state in wanted.taps.items():
            found[layer] = self._rows_of(state, tokens)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class StepWanted:
    """What a call brings beside its tokens, and the tensors that it fills; all float32 and contiguous."""

    logits: torch.Tensor | None = None  # [R, outputs of the head]
    hidden: torch.Tensor | None = None  # [R, width], after the last norm
    taps: Mapping[int, torch.Tensor] | None = None  # layer -> [T, width]
    embedded: torch.Tensor | None = None  # [T, width], for programs without an embedding
    tables: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None  # cos and sin [T, r] of ropes without any


_NOTHING = (0,) * 13 + (0.0, 0.0, 0, 0)  # the fields of ATTENTION that are a layer's
_FAILURES = {
    1: "a sequence reaches outside its tokens, its block table or the {num_slots} slots of the pool",
    3: "an id is not in the vocabulary",
    4: "a position is negative, or past the model's rotary tables",
    5: "a slot is not one of the pool's {num_slots}",
    6: "a wanted row is not one of the tokens",
}


def _failure(code: int, num_slots: int) -> Exception:
    if code in _FAILURES:
        return IndexError(_FAILURES[code].format(num_slots=num_slots))
    return MemoryError("no memory for the workspace of a step")
