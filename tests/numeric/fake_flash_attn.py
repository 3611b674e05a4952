"""The two functions of flash-attn 2 that we call, with its signatures and documented meaning, one query at a time.

What its C++ refuses is an assertion here. `calls` names the functions in the order they were called.
"""

from __future__ import annotations

import math

import torch

__version__ = "2.8.3"
calls: list[str] = []


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    calls.append("varlen")
    assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32 and q.dim() == 3
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
    check_pages(q, k, v, block_table, 256)
    parts = q.split(cu_seqlens_q.diff().tolist())
    lens = cu_seqlens_k.diff().tolist()
    return torch.cat(attend_all(parts, lens, k, v, block_table, softmax_scale, causal, window_size, softcap))


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    calls.append("with_kvcache")
    assert q.dim() == 4 and cache_seqlens.dtype is torch.int32 and cache_seqlens.shape[0] == q.shape[0]
    check_pages(q, k_cache, v_cache, block_table, 256)
    lens = cache_seqlens.tolist()
    return torch.stack(attend_all(q, lens, k_cache, v_cache, block_table, softmax_scale, causal, window_size, softcap))


def check_pages(q, k, v, block_table, page_multiple):
    assert q.dtype is k.dtype is v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == block_table.stride(-1) == 1
    assert k.dim() == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    assert k.shape[1] % page_multiple == 0, f"Paged KV cache block size must be divisible by {page_multiple}"
    assert block_table.dtype is torch.int32 and q.shape[-2] % k.shape[2] == 0


def attend_all(queries, lens, k, v, block_table, scale, causal, window, softcap):
    """One output for each sequence's queries [m, heads, dim]."""
    outputs = []
    for query, length, table in zip(queries, lens, block_table, strict=True):
        used = table[: math.ceil(length / k.shape[1])].long()
        key, value = (pages[used].flatten(0, 1)[:length].float() for pages in (k, v))
        out = torch.zeros_like(query)
        for i in range(query.shape[0]):
            place = i + length - query.shape[0]  # the mask is aligned with the bottom right corner
            first = 0 if window[0] < 0 else max(place - window[0], 0)
            after = place if causal else length if window[1] < 0 else place + window[1]
            last = min(after, place) if causal else after
            seen = slice(first, min(last + 1, length))
            if seen.stop > seen.start:
                out[i] = attend_one(query[i].float(), key[seen], value[seen], scale, softcap).to(query.dtype)
        outputs.append(out)
    return outputs


def attend_one(query, key, value, scale, softcap):
    """query [heads, dim], key and value [n, kv_heads, dim] -> [heads, dim]."""
    key, value = (part.repeat_interleave(query.shape[0] // key.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("hd,nhd->hn", query, key) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), value)
