"""Fails on whatever would make the host wait for a device, on any device: what a captured step must not do.

Seen are operations whose result's shape depends on values (`nonzero`, boolean indexing), those that bring a value to
the host (`item`, `tolist`, `bool(tensor)`), copies between devices that wait, and tensors made from host numbers, which
on a GPU are copies out of pageable memory. `TorchDispatchMode` sees what reaches the dispatcher, `TorchFunctionMode`
what does not. Code behind `data_ptr` (our own kernels) is not seen.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_BY_VALUE = {
    "aten._local_scalar_dense": "brings a number to the host",
    "aten.item": "brings a number to the host",
    "aten.is_nonzero": "brings a number to the host",
    "aten.equal": "brings an answer to the host",
    "aten.nonzero": "its shape depends on values",
    "aten.where.default": "its shape depends on values",
    "aten.nonzero_numpy": "its shape depends on values",
    "aten.masked_select": "its shape depends on values",
    "aten.unique_dim": "its shape depends on values",
    "aten._unique2": "its shape depends on values",
    "aten.unique_consecutive": "its shape depends on values",
    "aten.repeat_interleave.Tensor": "its shape depends on values",
    "aten.repeat_interleave.self_Tensor": "its shape depends on values",
    "aten.bincount": "its shape depends on values",
    "aten.lift_fresh": "makes a tensor from the host's numbers",
    "aten.scalar_tensor": "makes a tensor from the host's numbers",
}
_TO_HOST = {
    "tolist",
    "numpy",
    "__array__",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "item",
    "cpu",
    "pin_memory",
}
_FROM_HOST = {"tensor", "as_tensor", "from_numpy", "frombuffer"}


class HostSync(AssertionError):
    """An operation that a captured step must not contain."""


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        packet = name.rpartition(".")[0]
        reason = _BY_VALUE.get(name) or _BY_VALUE.get(packet)
        if reason:
            raise HostSync(f"{name}: {reason}")
        if packet in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise HostSync(f"{name}: an index of {index.dtype}, whose shape depends on values")
                if index is not None and index.device != args[0].device:
                    raise HostSync(f"{name}: an index on {index.device}")
        if packet in ("aten._to_copy", "aten.to", "aten.copy_"):
            _check_copy(name, args, kwargs)
        return func(*args, **kwargs)


def _check_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name.startswith("aten.copy_"):
        target, source = args[0].device, args[1].device
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        source = args[0].device
        target = kwargs.get("device") or next((each for each in args if isinstance(each, torch.device)), source)
        waits = not (kwargs.get("non_blocking", False) or any(each is True for each in args))
    if source != target and waits:
        raise HostSync(f"{name}: a copy from {source} to {target} that waits")


class _Called(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _TO_HOST and args and isinstance(args[0], torch.Tensor):
            raise HostSync(f"Tensor.{name}: brings numbers to the host")
        if name in _FROM_HOST:
            raise HostSync(f"torch.{name}: makes a tensor from the host's numbers")
        return func(*args, **(kwargs or {}))


class NoHostSync:
    """Within this, every such operation raises HostSync."""

    def __enter__(self) -> NoHostSync:
        self._modes = (_Called(), _Dispatched())
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, traceback)
