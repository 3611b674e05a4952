"""The function of FlashAttention-3 that we call; see `fake_flash_attn`."""

from __future__ import annotations

import torch

from tests.numeric.fake_flash_attn import attend_all, check_pages

calls: list[str] = []


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    calls.append("with_kvcache")
    assert q.dim() == 3 and cu_seqlens_q.dtype is cache_seqlens.dtype is torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    check_pages(q, k_cache, v_cache, page_table, 1)
    parts, lens = q.split(cu_seqlens_q.diff().tolist()), cache_seqlens.tolist()
    return torch.cat(attend_all(parts, lens, k_cache, v_cache, page_table, softmax_scale, causal, window_size, softcap))
