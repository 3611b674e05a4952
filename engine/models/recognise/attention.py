"""Which modules are attention with plain projections, whatever they and their parts are called."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import nn

from engine.models.context import ForwardContext
from engine.models.fused.attention import FusedAttention, RopeForm
from engine.models.fused.parts import FusedNorm, merge_linears
from engine.models.recognise.compare import close
from engine.models.recognise.contexts import ProbingContext
from engine.models.recognise.mlp import linears_of
from engine.models.recognise.trace import FAILURES, Attend, Call, Trace, slot_of
from engine.runtime.kv_cache import LayerShape

# How rotary pairs may be laid out: (form of cos and sin, pairs are neighbours)
_ROTATIONS = (
    (RopeForm.NONE, False),
    (RopeForm.FULL, False),
    (RopeForm.FULL, True),
    (RopeForm.PAIRS_OF_HALF, True),
    (RopeForm.HALVES, False),
    (RopeForm.PAIRS, True),
)


def find_attention(
    name: str, module: nn.Module, trace: Trace, model: nn.Module, context: ForwardContext
) -> FusedAttention | None:
    """A fused attention that computes what `module` does, or None.

    Its projections are the linear layers that read its input, one for all or one each for query, key and value; another
    turns the attended values into its output. Between them may be norms and a rotation, which are found by trial.
    """
    call, attends = trace.only(name), trace.attends.get(name, [])
    if call is None or len(attends) != 1 or call.hidden is None or call.hidden.dim() != 3 or call.result is None:
        return None
    if not isinstance(call.output, tuple) or len(call.output) != 2 or call.output[1] is not None:
        return None
    attend, linears = attends[0], linears_of(name, module, trace)
    attended = attend.out.flatten(1).unsqueeze(0)
    into = [key for key, each in linears.items() if each.hidden is not None and torch.equal(each.hidden, call.hidden)]
    out = [key for key, each in linears.items() if each.hidden is not None and torch.equal(each.hidden, attended)]
    if len(out) != 1 or not torch.equal(linears[out[0]].output, call.result):  # type: ignore[arg-type]  # a tensor
        return None
    for ordered, rows in _orders(attend, {key: linears[key] for key in into}):
        qkv = [model.get_submodule(key) for key in ordered]
        raw = torch.cat([linears[key].result[0] for key in ordered], dim=-1)  # type: ignore[index]  # a tensor
        raw = raw if rows is None else raw[:, rows]
        fused = _with_layout(name, module, attend, raw, call, trace)
        if fused is None:
            continue
        fused.qkv = qkv[0] if len(qkv) == 1 and rows is None else merge_linears(qkv, rows)
        fused.o_proj = model.get_submodule(out[0])
        return fused if _agree(module, fused, call, context) else None
    return None


def _sizes(attend: Attend) -> list[int]:
    return [attend.query[0].numel(), attend.key[0].numel(), attend.value[0].numel()]


def _orders(attend: Attend, into: dict[str, Call]) -> Iterator[tuple[list[str], torch.Tensor | None]]:
    """Orders of the projections, and of the rows of their joint output, that give query, key, value."""
    sizes, value = _sizes(attend), attend.value.flatten(1)
    if len(into) == 1:
        ((name, call),) = into.items()
        assert call.result is not None
        for rows in (None, _grouped(attend, call.result.device)):
            raw = call.result[0] if rows is None else call.result[0][:, rows]
            if raw.shape[-1] == sum(sizes) and torch.equal(raw[:, -sizes[2] :], value):
                yield [name], rows
    elif len(into) == 3:
        for names in permutations(into):
            outputs = [into[name].result for name in names]
            found = [out[0] for out in outputs if out is not None]
            if [out.shape[-1] for out in found] == sizes and torch.equal(found[2], value):
                yield list(names), None


def _grouped(attend: Attend, device: torch.device) -> torch.Tensor | None:
    """The rows of a product that holds, for each key/value head, its queries, its key and its value together."""
    kv_heads, heads = attend.key.shape[1], attend.query.shape[1]
    key_dim, value_dim = attend.key.shape[2], attend.value.shape[2]
    queries = heads // kv_heads * key_dim
    rows = torch.arange(kv_heads * (queries + key_dim + value_dim), device=device).view(kv_heads, -1)
    query, key, value = rows.split([queries, key_dim, value_dim], dim=1)
    return torch.cat((query.flatten(), key.flatten(), value.flatten()))


def _with_layout(
    name: str, module: nn.Module, attend: Attend, raw: torch.Tensor, call: Call, trace: Trace
) -> FusedAttention | None:
    """Fused attention without its linear layers, with the norms and rotation that lead from `raw` to `attend`."""
    heads, kv_heads, key_dim = attend.query.shape[1], attend.key.shape[1], attend.key.shape[2]
    shape = LayerShape(kv_heads, key_dim, attend.value.shape[2])
    query, key, _ = raw.split(_sizes(attend), dim=-1)
    norms = [_norm_of(section, count, name, module, trace) for section, count in ((query, heads), (key, kv_heads))]
    numbers = {(norm.eps, norm.offset) for norm in norms if norm is not None}
    if len(numbers) > 1:
        return None
    given = call.kwargs.get("position_embeddings")
    fused = FusedAttention(nn.Identity(), nn.Identity(), shape, heads, attend.layer)
    fused.set_options(attend.options.scale, attend.options.window, attend.options.softcap, attend.options.sinks)
    fused.slot = slot_of(module)
    for form, interleaved in _ROTATIONS:
        fused.set_layout(form, interleaved, *norms)
        probe = ProbingContext()
        try:
            rope = fused.rope(given)  # type: ignore[arg-type]  # whatever it is, the outcome is compared
            if rope[0] is not None and rope[0].shape[-1] > key_dim:
                continue
            fused.run(raw, rope, probe)
        except FAILURES:
            continue
        if _same_attend(probe.seen[0], attend):
            return fused
    return None


def _norm_of(section: torch.Tensor, heads: int, name: str, module: nn.Module, trace: Trace) -> FusedNorm | None:
    """The norm in `module` that was called on a section [T, heads * dim] of the projections, if there is one."""
    by_head = section.unflatten(-1, (heads, -1))
    shapes = (section, section[None], by_head, by_head[None], by_head.transpose(0, 1)[None])
    for child_name, child in module.named_modules(prefix=name):
        call = trace.only(child_name)
        if isinstance(child, FusedNorm) and call is not None and call.hidden is not None:
            for shaped in shapes:
                if call.hidden.shape == shaped.shape and torch.equal(call.hidden, shaped):
                    return child
    return None


def _same_attend(got: Attend, want: Attend) -> bool:
    """The same query, key, value and constants."""
    same = close(got.query, want.query) and close(got.key, want.key) and close(got.value, want.value)
    return same and got.layer == want.layer and got.options.same(want.options)


def _agree(module: nn.Module, fused: FusedAttention, call: Call, context: ForwardContext) -> bool:
    """Both ask the same of attention and make the same of its answer. Over the pool, one gives what the other gave."""
    doubled = call.doubled()
    try:
        (wanted, want), (given, got) = [_probed(doubled, candidate) for candidate in (module, fused)]
        out = call.again(fused, context)
    except FAILURES:
        return False
    assert isinstance(out, tuple) and call.result is not None
    return _same_attend(given, wanted) and close(got, want) and close(out[0][0], call.result[0])


def _probed(call: Call, module: nn.Module) -> tuple[Attend, torch.Tensor]:
    probe = ProbingContext()
    out = call.again(module, probe)
    assert isinstance(out, tuple)
    return probe.seen[0], out[0][0]
