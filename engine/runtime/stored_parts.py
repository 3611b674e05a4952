"""Fused modules as data, and back: JSON for their structure, named tensors for their weights.

`Unstorable` is raised for whatever is not known here: a model with such a part is loaded anew at each start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar, cast

from torch import nn

from engine.kernels.matrix import PackedMatrix
from engine.models.fused.attention import FusedAttention, RopeForm
from engine.models.fused.embedding import HalfEmbedding, PackedEmbedding
from engine.models.fused.layer import FusedLayer, Wiring
from engine.models.fused.mlp import FusedMLP
from engine.models.fused.parts import FusedNorm
from engine.runtime.kv_cache import LayerShape
from engine.runtime.linear import NativeLinear
from engine.runtime.stored_data import Form, Keeper, Reader, Unstorable

_SECTIONS = ("qkv", "o_proj", "q_norm", "k_norm")  # of attention


def part_form(module: nn.Module | None, keeper: Keeper) -> Form:
    """A norm, a linear layer, an embedding table, attention, an MLP or a layer. Raises Unstorable."""
    kind = type(module)
    if module is None:
        return {"kind": "none"}
    if kind not in _PARTS or module._forward_hooks or module._forward_pre_hooks:
        raise Unstorable(f"{kind.__module__}.{kind.__name__}")
    name, describe, _ = _PARTS[kind]
    return {"kind": name, **describe(module, keeper)}


def make_optional(form: Reader) -> nn.Module | None:
    """What `part_form` described."""
    kind = form.text("kind")
    if kind == "none":
        return None
    (make,) = (make for name, _, make in _PARTS.values() if name == kind)
    return make(form).eval().requires_grad_(False)


def make_part(form: Reader) -> nn.Module:
    """The same, where there must be something."""
    made = make_optional(form)
    if made is None:
        raise TypeError("a part is missing")
    return made


def _matrix_form(matrix: PackedMatrix, keeper: Keeper) -> Form:
    tensors = {name: keeper.keep(tensor) for name, tensor in matrix.tensors().items()}
    return {"format": matrix.format, "outputs": matrix.outputs, "inputs": matrix.inputs, "tensors": tensors}


def _make_matrix(form: Reader) -> PackedMatrix:
    sizes = form.integer("outputs"), form.integer("inputs")
    return PackedMatrix.from_tensors(form.text("format"), *sizes, form.named_tensors("tensors"))


def _norm_form(norm: FusedNorm, keeper: Keeper) -> Form:
    return {"weight": keeper.keep(norm.weight), "eps": norm.eps, "offset": norm.offset}


def _layer_norm_form(norm: nn.LayerNorm, keeper: Keeper) -> Form:
    tensors = {"weight": keeper.optional(norm.weight), "bias": keeper.optional(norm.bias)}
    return {"shape": list(norm.normalized_shape), "eps": norm.eps, **tensors}


def _make_layer_norm(form: Reader) -> nn.LayerNorm:
    norm = nn.LayerNorm(form.integers("shape"), form.number("eps"), device="meta")
    for name in ("weight", "bias"):
        norm.register_parameter(name, form.optional_parameter(name))
    return norm


def _linear_form(linear: nn.Linear, keeper: Keeper) -> Form:
    return {"weight": keeper.keep(linear.weight), "bias": keeper.optional(linear.bias)}


def _make_linear(form: Reader) -> nn.Linear:
    weight = form.parameter("weight")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", form.optional_parameter("bias"))
    return linear


def _table_form(table: nn.Embedding, keeper: Keeper) -> Form:
    if table.max_norm is not None:
        raise Unstorable("an embedding with max_norm")
    return {"weight": keeper.keep(table.weight)}


def _mlp_form(mlp: FusedMLP, keeper: Keeper) -> Form:
    if not mlp.kind:
        raise Unstorable(f"the activation {type(mlp.act_fn).__name__}")
    parts = {name: part_form(mlp.get_submodule(name), keeper) for name in ("gate_up", "down_proj")}
    return {"activation": mlp.kind, **parts}


def _make_mlp(form: Reader) -> FusedMLP:
    gate_up, down = (make_part(form.child(name)) for name in ("gate_up", "down_proj"))
    return FusedMLP(gate_up, down, form.text("activation"))


def _attention_form(module: FusedAttention, keeper: Keeper) -> Form:
    options = {"scale": module.scale, "window": module.window, "softcap": module.softcap}
    return {
        "shape": asdict(module.shape),
        "heads": module.layout.heads,
        "layer": module.layer_idx,
        "rope": module.rope_form.value,
        "interleaved": int(module.layout.interleaved),
        **options,
        "sinks": keeper.optional(module.sinks),
        **{name: part_form(module._modules.get(name), keeper) for name in _SECTIONS},
    }


def _make_attention(form: Reader) -> FusedAttention:
    sizes = form.child("shape")
    shape = LayerShape(sizes.integer("kv_heads"), sizes.integer("key_dim"), sizes.integer("value_dim"))
    qkv, out, *norms = (make_optional(form.child(name)) for name in _SECTIONS)
    if qkv is None or out is None:
        raise TypeError("a product is missing")
    made = FusedAttention(qkv, out, shape, form.integer("heads"), form.integer("layer"))
    query_norm, key_norm = (norm if isinstance(norm, FusedNorm) else None for norm in norms)
    made.set_layout(RopeForm(form.text("rope")), bool(form.integer("interleaved")), query_norm, key_norm)
    window = None if form.values["window"] is None else form.integer("window")
    made.set_options(form.number("scale"), window, form.optional_number("softcap"), form.optional_parameter("sinks"))
    return made


def _layer_form(layer: FusedLayer, keeper: Keeper) -> Form:
    if layer.reduce is not None:
        raise Unstorable("a layer whose weights are slices")
    wiring = asdict(layer.wiring)
    used = [name for name in wiring.values() if isinstance(name, str) and name]
    return {"wiring": wiring, "children": {name: part_form(layer.get_submodule(name), keeper) for name in used}}


def _make_layer(form: Reader) -> FusedLayer:
    shell = nn.Module()
    for name, child in form.children("children").items():
        shell.add_module(name, make_part(child))
    wiring = Wiring(**form.child("wiring").values)  # type: ignore[arg-type]  # as `asdict` wrote them
    return FusedLayer(shell, wiring, returns_tuple=False)


def _make_half(form: Reader) -> HalfEmbedding:
    return HalfEmbedding(form.tensor("table"), form.number("scale"))


_Part = TypeVar("_Part", bound=nn.Module)
_Entry = tuple[str, Callable[[nn.Module, Keeper], Form], Callable[[Reader], nn.Module]]


def _entry(
    kind: type[_Part], name: str, describe: Callable[[_Part, Keeper], Form], make: Callable[[Reader], _Part]
) -> tuple[type, _Entry]:
    return kind, (name, cast(Callable[[nn.Module, Keeper], Form], describe), make)


def _make_norm(form: Reader) -> FusedNorm:
    return FusedNorm(form.parameter("weight"), form.number("eps"), form.number("offset"))


def _half_form(table: HalfEmbedding, keeper: Keeper) -> Form:
    return {"table": keeper.keep(table.table), "scale": table.scale}


def _packed_form(table: PackedEmbedding, keeper: Keeper) -> Form:
    return {"matrix": _matrix_form(table.matrix, keeper), "scale": table.scale}


# Type of a module -> (its kind in the file, to data, and back).
_PARTS: dict[type, _Entry] = dict(
    (
        _entry(FusedNorm, "norm", _norm_form, _make_norm),
        _entry(nn.LayerNorm, "layer norm", _layer_norm_form, _make_layer_norm),
        _entry(nn.Linear, "linear", _linear_form, _make_linear),
        _entry(
            NativeLinear,
            "packed linear",
            lambda linear, keeper: {"matrix": _matrix_form(linear.matrix, keeper)},
            lambda form: NativeLinear(_make_matrix(form.child("matrix"))),
        ),
        _entry(nn.Embedding, "table", _table_form, lambda form: nn.Embedding.from_pretrained(form.tensor("weight"))),
        _entry(HalfEmbedding, "half table", _half_form, _make_half),
        _entry(
            PackedEmbedding,
            "packed table",
            _packed_form,
            lambda form: PackedEmbedding(_make_matrix(form.child("matrix")), form.number("scale")),
        ),
        _entry(FusedMLP, "mlp", _mlp_form, _make_mlp),
        _entry(FusedAttention, "attention", _attention_form, _make_attention),
        _entry(FusedLayer, "layer", _layer_form, _make_layer),
    )
)
