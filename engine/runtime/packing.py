"""Which layers of a network are packed into which format, and what its weights take."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from engine.kernels import fp8
from engine.kernels.matrix import GROUPS
from engine.kernels.reference_matrix import round_rows, rounded
from engine.models.fused.embedding import HalfEmbedding, PackedEmbedding
from engine.runtime.linear import NativeLinear, PackedLinear, pack_weight

MADV_PAGEOUT = 21  # <linux/mman.h>; safe on any memory, unlike MADV_DONTNEED
_PACKED = (NativeLinear, PackedEmbedding)
Ends = tuple[nn.Module | None, nn.Module | None]  # the embedding table and the output head


def format_of(quant: str, is_head: bool) -> str:
    """The format of a linear layer, or none. An output head's rounding goes straight into the logits.

    So it keeps 8 bits, and more than the 4 digits of fp8.
    """
    return {"int4": "int8", "fp8": "none"}.get(quant, quant) if is_head else quant


def linear_parts(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight [out, in] and bias of exactly a linear layer (a subclass may do more than multiply); None for others."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    kind = type(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):  # not worth the import
        weight, bias = module.weight, module.bias
        assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
        return weight.T, bias
    return None


@torch.inference_mode()
def pack_linears(model: nn.Module, quant: str = "fp16", head: nn.Module | None = None) -> int:
    """Replace linear layers by packed ones, in place; their number. What stays is copied out of the file.

    `head` is the output head, where it is among them. Layers stay whose weights a format can't hold.
    """
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            parts, format = linear_parts(child), format_of(quant, child is head)
            if parts is None or format == "none":
                continue
            try:
                setattr(parent, name, pack_weight(*parts, format))
            except ValueError:  # too large for fp16, or not finite
                continue
            release_pages(child)
            packed += 1
    # One tensor that still points into the file would keep all of its pages in memory.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return packed


def pack_embedding(table: nn.Module, head: nn.Module | None, tied: bool) -> nn.Module:
    """What takes the place of an embedding table where linear layers are packed; the table itself where none can.

    `head` is the packed output head, and `tied` says that its weights were the table's.
    """
    weight, scale = getattr(table, "weight", None), embedding_scale(table)
    if scale is None or not isinstance(weight, torch.Tensor):
        return table
    if tied and isinstance(head, NativeLinear):
        return PackedEmbedding(head.matrix, scale)
    return HalfEmbedding(weight.half(), scale) if _fits_half(weight) else table


def _fits_half(weight: torch.Tensor) -> bool:
    low, high = (float(bound) for bound in torch.aminmax(weight))
    return max(-low, high) <= torch.finfo(torch.float16).max


@torch.no_grad()
def embedding_scale(table: nn.Module) -> float | None:
    """The number by which a module multiplies rows of its `weight`; None for one that does anything else."""
    if not isinstance(table, nn.Embedding) or table.weight.dtype is not torch.float32:
        return None
    ids = torch.tensor([0, table.num_embeddings // 2, table.num_embeddings - 1])
    if table.max_norm is not None:
        return None
    out, plain = table(ids), table.weight[ids]
    own = (*vars(table).values(), *table.buffers())
    numbers = [float(value) for value in own if isinstance(value, float) or _is_number(value)]
    return next((scale for scale in dict.fromkeys((1.0, *numbers)) if torch.equal(out, plain * scale)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


@contextmanager
def rounded_numbers(model: nn.Module, quant: str, ends: Ends) -> Iterator[None]:
    """Within this, linear layers and the embedding table compute with the numbers that packing will leave of them.

    With weights as they will be packed, and inputs as the kernels round them, in fp32 by torch's own operations, one
    layer at a time: what packed layers are compared with.
    """
    table, head = ends
    tied = table is not None and head is not None and are_tied(table, head)
    hooks = []
    for module in model.modules():
        if linear_parts(module) is not None:
            hooks += _rounding(module, format_of(quant, module is head))
        elif module is table and embedding_scale(module) is not None:
            hooks += _rounding(module, format_of(quant, True) if tied else "half")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def are_tied(table: nn.Module, head: nn.Module) -> bool:
    """Whether an embedding table and an output head share their weights."""
    first, second = getattr(table, "weight", None), getattr(head, "weight", None)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.data_ptr() == second.data_ptr()


def _rounding(module: nn.Module, format: str) -> list[torch.utils.hooks.RemovableHandle]:
    kept: list[torch.Tensor] = []
    if format == "none":
        return []

    def enter(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        parameter = layer._parameters["weight"]
        assert parameter is not None
        kept.append(parameter.data)
        parameter.data = _rounded(layer, format)
        if parameter.data is kept[-1] or linear_parts(layer) is None:  # it stays as it is, or looks up
            return args
        return _rounded_input(args[0], format), *args[1:]

    def leave(layer: nn.Module, _: tuple[object, ...], __: object) -> None:
        parameter = layer._parameters["weight"]
        assert parameter is not None
        parameter.data = kept.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _rounded_input(x: torch.Tensor, format: str) -> torch.Tensor:
    """x [..., in] as a packed layer of this format reads it."""
    if format == "fp8":
        return fp8.rounded(x.reshape(-1, x.shape[-1])).view(x.shape)
    if not GROUPS[format]:
        return x
    codes, scales = round_rows(x.reshape(-1, x.shape[-1]), GROUPS[format])
    return (codes * scales[..., None]).flatten(1)[:, : x.shape[-1]].view(x.shape)


def _rounded(layer: nn.Module, format: str) -> torch.Tensor:
    """The layer's `weight` as packing leaves it."""
    parts, stored = linear_parts(layer), layer._parameters["weight"]
    assert stored is not None
    if format == "half":
        return stored.data.half().float() if _fits_half(stored.data) else stored.data
    if format == "fp8":
        return _fp8(layer, stored.data)
    try:
        weight = rounded(stored.data if parts is None else parts[0], format, GROUPS[format])
    except ValueError:
        return stored.data
    return weight if parts is None or type(layer) is nn.Linear else weight.T


def _fp8(layer: nn.Module, stored: torch.Tensor) -> torch.Tensor:
    """The stored weight of a linear layer as fp8 leaves it; of others, and where it can't, as it is."""
    parts = linear_parts(layer)
    try:
        weight = None if parts is None else fp8.pack(parts[0]).unpack().to(stored.dtype)
    except ValueError:
        return stored
    if weight is None:
        return stored
    return weight if type(layer) is nn.Linear else weight.T


def weight_bytes(module: nn.Module) -> int:
    """What a module's weights take, packed ones as packed; shared ones count once."""
    tensors = [*module.parameters(), *module.buffers()]
    matrices = {id(part.matrix): part.matrix for part in module.modules() if isinstance(part, _PACKED)}
    for matrix in matrices.values():
        tensors += matrix.tensors().values()
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    packed = sum(part.packed_bytes for part in module.modules() if isinstance(part, PackedLinear))
    return sum(held.values()) + packed


def release_pages(module: nn.Module) -> None:
    """Let the kernel drop the pages of weights that are no longer read: half of the peak memory of a start.

    They are mapped from the checkpoint, so nothing is lost; a kernel without MADV_PAGEOUT (before 5.4) just says no.
    """
    for parameter in module.parameters():
        release_tensor(parameter.data)


def release_tensor(tensor: torch.Tensor) -> None:
    """The same for one tensor in this machine's memory."""
    if tensor.device.type == "cpu":
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - begin
        if length > 0:
            _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_PAGEOUT)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
