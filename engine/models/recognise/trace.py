"""What happened inside a model during one forward pass: the evidence that structure is recognised by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.models.context import ContextSlot, ForwardContext

_Value = TypeVar("_Value")
# What calling a module with the wrong things may raise; the candidate is then dropped.
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, ModelLoadError, RuntimeError, TypeError, ValueError)
LARGE = 16.0  # inputs times this show clamps


@dataclass(frozen=True, slots=True, eq=False)
class AttendOptions:
    """The constants that an attention module hands to its attention function."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def same(self, other: AttendOptions) -> bool:
        if (self.scale, self.window, self.softcap) != (other.scale, other.window, other.softcap):
            return False
        if self.sinks is None or other.sinks is None:
            return self.sinks is other.sinks
        return torch.equal(self.sinks, other.sinks)


@dataclass(frozen=True, slots=True, eq=False)
class Attend:
    """One call of the attention function. query [T, heads, key_dim]; key, value [T, kv_heads, dim]; out as query."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttendOptions
    out: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module: what went in and came out.

    Not copied: that would double the memory. A tensor that was overwritten later in the pass is no evidence, which can
    only leave something unfused: whatever is built on it is compared in calls of its own.
    """

    args: tuple[object, ...]
    kwargs: dict[str, object]
    output: object

    @property
    def hidden(self) -> torch.Tensor | None:
        """The hidden states it was given: its first argument, or the one of that name."""
        given = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return given if isinstance(given, torch.Tensor) else None

    @property
    def result(self) -> torch.Tensor | None:
        """The tensor it returned, alone or before others."""
        value = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return value if isinstance(value, torch.Tensor) else None

    def doubled(self) -> Call:
        """This call with every token twice, the second time with LARGE hidden states.

        Shows what is clamped, and what depends on the number of tokens.
        """
        hidden = self.hidden
        assert hidden is not None
        tokens = hidden.shape[:2]

        def twice(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat((tensor, tensor), dim=1) if tensor.shape[:2] == tokens else tensor

        both = torch.cat((hidden, hidden * LARGE), dim=1)
        args, kwargs = _each_tensor(self.args, twice), _each_tensor(self.kwargs, twice)
        if self.args:
            return Call((both, *args[1:]), kwargs, None)
        return Call(args, {**kwargs, "hidden_states": both}, None)

    def again(self, module: nn.Module, context: ForwardContext | None) -> object:
        """Call `module` as this call was made, over another context."""
        args, kwargs = _each_tensor(self.args, torch.clone), _each_tensor(self.kwargs, torch.clone)
        if "slipstream" in kwargs:
            kwargs["slipstream"] = context
        with _slot(module, context):
            return module(*args, **kwargs)


@dataclass(slots=True, eq=False)
class Trace:
    """All calls of one forward pass, by the name of the module; and which module each attention call came from."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    attends: dict[str, list[Attend]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)

    def only(self, name: str) -> Call | None:
        """The call of a module that was called exactly once."""
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None


def slot_of(module: nn.Module) -> ContextSlot | None:
    """Where the adapter puts the context for modules that are not handed it as an argument, if `module` has one."""
    for part in module.modules():
        slot = getattr(part, "slipstream_slot", None) or getattr(part, "slot", None)
        if isinstance(slot, ContextSlot):
            return slot
    return None


@contextmanager
def _slot(module: nn.Module, context: ForwardContext | None) -> Iterator[None]:
    """Fill the adapter's slot for modules that are not handed the context as an argument."""
    slot = slot_of(module)
    if slot is None:
        yield
        return
    before, slot.context = slot.context, context
    try:
        yield
    finally:
        slot.context = before


def _each_tensor(value: _Value, change: Callable[[torch.Tensor], torch.Tensor]) -> _Value:
    """`value` with every tensor in its tuples, lists and dictionaries changed; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return cast(_Value, change(value))
    if type(value) in (tuple, list):
        parts = [_each_tensor(part, change) for part in cast(Sequence[object], value)]
        return cast(_Value, tuple(parts) if isinstance(value, tuple) else parts)
    if type(value) is dict:
        named = cast(dict[str, object], value)
        return cast(_Value, {key: _each_tensor(part, change) for key, part in named.items()})
    return value
