"""A whole fused model as data, and back: its backbone with where cos and sin come from, its head, its configuration."""

from __future__ import annotations

import json

import torch
from torch import nn

from engine.models.draft_host import embedding_of, head_of
from engine.models.fused.attention import RopeForm
from engine.models.fused.backbone import FusedBackbone, RopeSource
from engine.models.fused.parts import FusedPart
from engine.models.rotary import LAYOUTS, angles
from engine.models.stored_model import StoredConfig, StoredModel, config_values, finish_logits
from engine.models.support import context_length, text_config
from engine.runtime.stored_data import Form, Keeper, Reader, Unstorable
from engine.runtime.stored_parts import make_part, part_form


@torch.inference_mode()
def model_form(model: nn.Module, keeper: Keeper) -> Form:
    """A fully fused model for `make_model`. Raises Unstorable that says what it can't be described for."""
    backbone = model.base_model
    if not isinstance(backbone, FusedBackbone):
        raise Unstorable("a backbone that is not fused")
    layers = list(backbone.get_submodule(backbone.layer_list).children())
    ends = {name: part_form(backbone._modules.get(name), keeper) for name in (backbone.norm_name, backbone.positions)}
    scale, softcap = (model.logits_scale, model.logits_softcap) if isinstance(model, StoredModel) else _finishing(model)
    return {
        "config": config_values(model.config),
        "text": config_values(text_config(model.config)),  # type: ignore[arg-type]
        "layers": [part_form(layer, keeper) for layer in layers],
        "names": [backbone.layer_list, backbone.embedding, backbone.norm_name, backbone.positions],
        "ends": {**ends, backbone.embedding: part_form(embedding_of(model), keeper)},  # type: ignore[arg-type]
        "embedding_scale": backbone.embedding_scale,
        "sources": [_source_form(source, model, keeper) for source in backbone.sources],
        "rope_of": backbone.rope_of,
        "head": part_form(head_of(model), keeper),  # type: ignore[arg-type]
        "scale": scale,
        "softcap": softcap,
    }


def make_model(form: Reader) -> StoredModel:
    """What `model_form` described, over the reader's tensors."""
    config = StoredConfig.of(form.child("config").values, form.child("text").values)
    layer_list, embedding, norm, positions = form.texts("names")
    shell, ends = nn.Module(), form.children("ends")
    for name in filter(None, (embedding, norm, positions)):
        shell.add_module(name, make_part(ends[name]))
    shell.add_module(layer_list, nn.ModuleList(make_part(layer) for layer in form.items("layers")))
    backbone = FusedBackbone(shell, layer_list, embedding, norm, positions, form.number("embedding_scale"))
    length = context_length(config)
    backbone.sources = [_make_source(source, length) for source in form.items("sources")]
    backbone.rope_of = form.integers("rope_of")
    head, scale = make_part(form.child("head")), form.number("scale")
    return StoredModel(config, backbone, head, scale, form.optional_number("softcap")).eval()


def _finishing(model: nn.Module) -> tuple[float, float | None]:
    """What the model's own class does to the head's logits: a scale and a cap, found by trying its numbers."""
    head, text = head_of(model), text_config(model.config)  # type: ignore[arg-type]
    backbone = model.base_model
    assert isinstance(backbone, FusedBackbone)
    x = torch.linspace(-3, 3, 2 * _width(backbone)).view(2, -1).sin()
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, __: (x[None],))
    try:
        hook_out = head.register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            want = _score(model)
        finally:
            hook_out.remove()
    finally:
        hook.remove()
    numbers = [float(value) for value in vars(text).values() if type(value) in (int, float) and value]
    scales = dict.fromkeys((1.0, *numbers, *(1 / number for number in numbers)))
    caps = dict.fromkeys((None, *(number for number in numbers if number > 1)))
    for softcap in caps:
        for scale in scales:
            if _same(finish_logits(seen[0], scale, softcap), want):
                return scale, softcap
    raise Unstorable("what becomes of the head's logits")


def _score(model: nn.Module) -> torch.Tensor:
    """The model's logits [1, 2, vocabulary] with a backbone that says nothing of use."""
    backbone = model.base_model
    assert isinstance(backbone, FusedBackbone)
    idle = _Idle(backbone)
    prefix = next((name for name, child in model.named_children() if child is backbone), "")
    if not prefix:
        raise Unstorable("a backbone inside another module")
    setattr(model, prefix, idle)
    try:
        return model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits
    finally:
        setattr(model, prefix, backbone)


class _Idle(FusedPart):
    """Stands in for a backbone and gives zeros."""

    def __init__(self, backbone: FusedBackbone) -> None:
        super().__init__()
        self._type, self._width = backbone.output_type, _width(backbone)

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        return self._type(last_hidden_state=torch.zeros(*input_ids.shape, self._width))


def _width(backbone: FusedBackbone) -> int:
    """Of the hidden states after its final norm."""
    norm = backbone.get_submodule(backbone.norm_name)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise Unstorable(f"the norm {type(norm).__name__}")
    return weight.shape[0]


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-6, atol=0)


def _source_form(source: RopeSource, model: nn.Module, keeper: Keeper) -> Form:
    """By its frequencies where cos and sin are those of a position times a frequency, else as its table."""
    length = context_length(model.config)  # type: ignore[arg-type]
    held = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    scalings = {float(v) for m in model.modules() for k, v in vars(m).items() if k.endswith("attention_scaling")}
    for _, frequencies in held:
        for scaling in sorted({1.0, *scalings}):
            for layout in LAYOUTS:
                if _explains(source, frequencies, scaling, layout, length):
                    kept = keeper.keep(frequencies)
                    return {"form": source.form.value, "frequencies": kept, "scaling": scaling, "layout": layout}
    if source.cos is None or source.sin is None:
        raise Unstorable("a rotary embedding of a form of its own")
    return {"form": source.form.value, "cos": keeper.keep(source.cos), "sin": keeper.keep(source.sin)}


def _explains(source: RopeSource, frequencies: torch.Tensor, scaling: float, layout: str, length: int) -> bool:
    """Whether these frequencies give the cos and sin of a source, for positions below `length`."""
    for places in ([0, 1, length // 2, length - 1], [1], [length - 1]):
        positions = torch.tensor([places])
        want, got = source.compute(positions), angles(positions, frequencies, scaling, layout)
        if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            return False
    return True


def _make_source(form: Reader, length: int) -> RopeSource:
    kind = RopeForm(form.text("form"))
    if "cos" in form.values:
        source = RopeSource(_no_positions, kind)
        source.cos, source.sin = form.tensor("cos"), form.tensor("sin")
        return source
    frequencies, scaling, layout = form.tensor("frequencies"), form.number("scaling"), form.text("layout")
    source = RopeSource(lambda positions: angles(positions, frequencies, scaling, layout), kind)
    source.tabulate(length, torch.device("cpu"))
    return source


def _no_positions(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("a table holds every position")


def dumped(form: Form) -> str:
    """JSON of a form; raises Unstorable where a configuration holds what JSON can't."""
    try:
        return json.dumps(form, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise Unstorable(f"its configuration: {error}") from error
