"""Every kernel of this room in plain torch: for any device and dtype, and the truth that the C code is held to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from engine.kernels.layout import MODES, HeadLayout, PagedBatch, PoolLayer

# Names of gated activations, as the code in `activations.c` numbers them.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
CELLS_ON_CPU = 1 << 18  # of a float64 softmax at once: 2 MB, which a processor's cache holds
CELLS = 1 << 23


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.add_rms_norm`."""
    total = x if residual is None else residual.add_(x)
    normed = rms_norm(total, weight, eps, offset)
    return (normed if out is None else out.copy_(normed)), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x [..., n] over the root of the mean of its squares (Zhang and Sennrich 2019), in fp32, times offset + weight."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (_wide(weight) + offset)).to(x.dtype)


def head_norm_rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    cache: PoolLayer,
    layout: HeadLayout,
) -> torch.Tensor:
    """See `ops.head_norm_rope_write`."""
    shape = cache.shape
    sizes = [layout.heads * shape.key_dim, shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim]
    query, key, value = qkv.split(sizes, dim=-1)
    query = _norm_section(query, layout.query_norm, layout).unflatten(-1, (layout.heads, shape.key_dim))
    key = _norm_section(key, layout.key_norm, layout).unflatten(-1, (shape.kv_heads, shape.key_dim))
    if cos is not None and sin is not None:
        query = rotate(query, cos, sin, layout.interleaved)
        key = rotate(key, cos, sin, layout.interleaved)
    joint = torch.cat((key.flatten(1), value), dim=-1)
    put_rows(cache.joint, slots, joint)
    return query.contiguous()


def put_rows(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Store `rows` [T, n], rounded to the pool's dtype, as its rows `slots` [T]."""
    as_bytes(pool).index_copy_(0, slots, as_bytes(rounded_to(rows, pool.dtype)))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, or its bytes where its dtype has one: torch moves few things of fp8."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def rounded_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a pool's dtype. Finite numbers beyond float16 become its largest; infinity and NaN stay what they are.

    An infinite key would carry NaN into all later tokens; a capped one is a far outlier still.
    """
    if dtype in (torch.float16, torch.float8_e4m3fn) and x.dtype is not dtype:
        largest = torch.finfo(dtype).max
        x = torch.where(x.isinf(), x, x.clamp(-largest, largest))
    return x.to(dtype)


def _norm_section(section: torch.Tensor, weight: torch.Tensor | None, layout: HeadLayout) -> torch.Tensor:
    if weight is None:
        return section
    grouped = section.unflatten(-1, (-1, weight.numel()))
    return rms_norm(grouped, weight, layout.eps, layout.offset).flatten(-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of the first r of x's [T, heads, d] dimensions; cos and sin are [T, r]."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    turned = (turned * cos[:, None] + partner * sin[:, None]).to(x.dtype)  # some models keep cos and sin in fp32
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def gated_activation(gate_up: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `ops.gated_activation`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if kind == "silu":
        active = F.silu(gate)
    elif kind == "relu":
        active = F.relu(gate)
    elif kind in ("gelu", "gelu_tanh"):
        active = F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    else:
        raise KeyError(kind)
    product = active * up
    return product if out is None else out.copy_(product)


def paged_attention(
    query: torch.Tensor,
    cache: PoolLayer,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `protocols.StepAttention`.

    One sequence after another, for checks; `attention.sdpa` is the fast torch path.
    """
    shape = cache.shape
    out = query.new_empty(query.shape[0], query.shape[1], shape.value_dim)
    starts = batch.starts.tolist()
    for seq, length in enumerate(batch.kv_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        keys = torch.arange(length)
        slots = batch.tables[seq].long()[keys // batch.block_size] * batch.block_size + keys % batch.block_size
        wide = _wide(query[rows])
        joint = cache.joint[slots].to(wide.dtype)
        cut = shape.kv_heads * shape.key_dim
        fold = query.shape[1] // shape.kv_heads
        key = joint[:, :cut].unflatten(-1, (shape.kv_heads, -1)).repeat_interleave(fold, dim=1)
        value = joint[:, cut:].unflatten(-1, (shape.kv_heads, -1)).repeat_interleave(fold, dim=1)
        scores = torch.einsum("mhd,lhd->hml", wide, key) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~_visible(batch, rows, keys, window), float("-inf"))
        if sinks is not None:
            extra = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[rows] = torch.einsum("hml,lhd->mhd", weights, value).to(query.dtype)
    return out


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _visible(batch: PagedBatch, rows: slice, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """[m, L] for the m queries of a sequence and its keys [L]."""
    mode, positions = MODES[batch.mode], batch.positions[rows, None]
    places = keys.expand(positions.shape[0], -1)  # where keys lie, for windows
    if mode == "tree":
        assert batch.tree_starts is not None and batch.tree_masks is not None
        masks, nodes = batch.tree_masks[rows], keys - batch.tree_starts[rows, None]
        bits = masks.gather(1, (nodes // 64).clamp(0, masks.shape[1] - 1)) >> (nodes % 64) & 1
        seen = (nodes < 0) | (nodes < 64 * masks.shape[1]) & bits.bool()
        fed = positions.shape[0]  # the last keys
        places = torch.cat((places[:, : keys.shape[0] - fed], positions.T.expand(fed, -1)), dim=1)
    elif mode == "causal":
        seen = keys <= positions
    elif mode == "block_causal":
        seen = keys // batch.block_length <= positions // batch.block_length
    else:
        seen = torch.ones_like(places, dtype=torch.bool)
    if window is not None:
        seen = seen & (places > positions - window)
        if mode in ("block_causal", "bidirectional"):
            seen = seen & (places < positions + window)
    return seen


def certainty(scores: torch.Tensor, tokens: torch.Tensor, measures: Iterable[str]) -> dict[str, torch.Tensor]:
    """See `certainty.certainty`. Softmax, and sums by cumsum, give a row the same whatever stands in the others."""
    cells = CELLS_ON_CPU if scores.device.type == "cpu" else CELLS
    rows = max(1, cells // scores.shape[1])
    parts: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("probability", *sorted(set(measures) - {"probability"}))
    }
    for part, chosen in zip(scores.split(rows), tokens.split(rows), strict=True):
        law = part.double().softmax(1)
        parts["probability"].append(law.gather(1, chosen.unsqueeze(1)).squeeze(1))
        if "margin" in parts:
            best = law.topk(min(2, law.shape[1]), dim=1).values
            parts["margin"].append(best[:, 0] - best[:, -1])
        if "entropy" in parts:
            parts["entropy"].append(torch.xlogy(law, law).cumsum_(1)[:, -1])
    return {name: torch.cat(values) for name, values in parts.items()}
