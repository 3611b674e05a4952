"""Triton kernels of `triton_paged`: attention of one work item, and the merge of split items.

A work item is one tile of query rows of one sequence over one range of its keys (`work.py` lays them out). The rows of
a tile are (token, head of the group) pairs that share one KV head, so that a key is read once for all of them. Softmax
runs online in base 2 and fp32 (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023, algorithm 1); an item that
covers a part of its keys leaves its normalised output and the base-2 logarithm of its sum, which `merge_splits` joins
(flash-decoding). Only features of Triton 3.6 are used.
"""

import triton
import triton.language as tl

CAUSAL = tl.constexpr(0)
TREE = tl.constexpr(1)
BLOCK_CAUSAL = tl.constexpr(2)
BIDIRECTIONAL = tl.constexpr(3)  # from BLOCK_CAUSAL on, queries see later keys, and a window hides them too
ITEM_FIELDS = tl.constexpr(8)
MERGE_CHUNK = tl.constexpr(8)


@triton.jit
def _interval(position, valid, start, kv_len, window, block_length, MODE: tl.constexpr, WINDOW: tl.constexpr):
    """Keys low <= key < high that each row sees, [BLOCK_M]; of a tree only those before it."""
    if MODE == CAUSAL:
        high = position + 1
    elif MODE == BLOCK_CAUSAL:
        high = (position // block_length + 1) * block_length
    elif MODE == TREE:
        high = start
    else:
        high = position * 0 + kv_len
    low = position * 0
    if WINDOW:
        low = tl.maximum(position - window + 1, 0)
        if MODE >= BLOCK_CAUSAL:
            high = tl.minimum(high, position + window)
    return low, tl.where(valid, tl.minimum(high, kv_len), 0)


@triton.jit
def _load_rows(pointers, wanted, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of rows that begin at `pointers`; 0 past DIM and in rows that are not wanted."""
    dim = tl.arange(0, BLOCK)
    return tl.load(pointers[:, None] + dim[None, :], mask=wanted[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(pointers, values, wanted, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """`_load_rows` the other way round, in the type that is pointed at."""
    dim = tl.arange(0, BLOCK)
    mask = wanted[:, None] & (dim < DIM)[None, :]
    tl.store(pointers[:, None] + dim[None, :], values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _slots(table, tile, bound, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pool slots of keys tile * BLOCK_N on, [BLOCK_N] int32; one load per page where pages and tiles fit together."""
    first = tile * BLOCK_N
    if PAGE % BLOCK_N == 0:
        slots = tl.load(table + first // PAGE) * PAGE + first % PAGE + tl.arange(0, BLOCK_N)
    elif BLOCK_N % PAGE == 0:
        pages = first // PAGE + tl.arange(0, BLOCK_N // PAGE)
        ids = tl.load(table + pages, mask=pages * PAGE < bound, other=0)
        slots = tl.reshape(ids[:, None] * PAGE + tl.arange(0, PAGE)[None, :], [BLOCK_N])
    else:
        keys = first + tl.arange(0, BLOCK_N)
        slots = tl.load(table + keys // PAGE, mask=keys < bound, other=0) * PAGE + keys % PAGE
    return slots


@triton.jit
def _tree_bits(masks, keys, start, valid, WORDS: tl.constexpr):
    """Is each key's bit set in each row's mask? [BLOCK_M, BLOCK_N]; `masks` points at the rows' first 32-bit words."""
    node = keys[None, :] - start[:, None]
    seen = node != node
    for word in tl.static_range(WORDS):
        bits = tl.load(masks + word, mask=valid, other=0)
        inside = (node >= word * 32) & (node < word * 32 + 32)
        seen = seen | (inside & (((bits[:, None] >> (node & 31)) & 1) != 0))
    return seen


# fmt: off
@triton.jit
def _visible(
    keys, bound, low, high, start, valid, masks, positions, fed_from,
    MODE: tl.constexpr, WINDOW: tl.constexpr, WORDS: tl.constexpr,
):
    """Which keys [BLOCK_N] each row sees, [BLOCK_M, BLOCK_N].

    A tree's keys have positions of their own: those fed in this step are keys `fed_from` on, at `positions`.
    """
    seen = keys[None, :] < high[:, None]
    if MODE == TREE:
        seen = (seen | _tree_bits(masks, keys, start, valid, WORDS)) & (keys < bound)[None, :]
    if WINDOW:
        if MODE == TREE:
            fed = (keys >= fed_from) & (keys < bound)
            place = tl.load(positions + (keys - fed_from), mask=fed, other=0).to(tl.int32)
            seen = seen & (tl.where(fed, place, keys)[None, :] >= low[:, None])
        else:
            seen = seen & (keys[None, :] >= low[:, None])
    return seen


# Numbers that change from step to step: none of them may be worth a compilation of its own.
@triton.jit(do_not_specialize=["window", "block_length", "table_row"])
def paged_attention(
    query, key, value, out, partial_out, partial_sum,
    items, kv_lens, query_positions, block_tables, tree_starts, tree_masks, sinks,
    multiplier, inner, window, block_length,
    query_token, query_head, out_token, out_head, table_row,
    SLOT: tl.constexpr, KEY_HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    MODE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, WORDS: tl.constexpr,
    SPLIT: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """One work item and KV head; program i does item i // KV_HEADS.

    query [T, heads, KEY_DIM], key and value [slots, KV_HEADS, dim] (rows SLOT apart), out [T, heads, VALUE_DIM].
    Exponents of base 2 are multiplier * dot, or, with a soft cap, multiplier * tanh(dot * inner * ln 2 / 2).
    """
    head = tl.program_id(0) % KV_HEADS
    item = items + (tl.program_id(0) // KV_HEADS) * ITEM_FIELDS
    sequence, first_token, num_tokens = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    row = tl.load(item + 3) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row // FOLD < num_tokens
    token = tl.where(valid, first_token + row // FOLD, first_token)
    heads = head * FOLD + row % FOLD
    kv_len = tl.load(kv_lens + sequence)
    position = tl.load(query_positions + token).to(tl.int32)
    start = tl.load(tree_starts + token) if MODE == TREE else position
    low, high = _interval(position, valid, start, kv_len, window, block_length, MODE, WINDOW)
    q = _load_rows(query + token.to(tl.int64) * query_token + heads * query_head, valid, KEY_DIM, BLOCK_K)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # one more key without a value, counted by the first of the splits
        sink = tl.load(sinks + heads).to(tl.float32) * 1.4426950408889634
        counted = (tl.load(item + 4) == 0) & valid
        top, total = tl.where(counted, sink, top), tl.where(counted, 1.0, total)
    acc, top, total = _attend(
        q if FP8 else q.to(key.dtype.element_ty), top, total, key + head * KEY_HEAD, value + head * VALUE_HEAD,
        block_tables + sequence * table_row, item, kv_len, low, high, start, valid,
        tree_masks + token * WORDS, query_positions + first_token, kv_len - num_tokens, multiplier, inner,
        SLOT, KEY_DIM, VALUE_DIM, PAGE, MODE, WINDOW, SOFTCAP, WORDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V,
    )
    total = tl.where(total > 0.0, total, 1.0)  # a row without keys gives 0
    acc = acc / total[:, None]
    if SPLIT:
        partial = tl.load(item + 6)
        place = (partial.to(tl.int64) * KV_HEADS + head) * BLOCK_M + tl.arange(0, BLOCK_M)
        part = row // FOLD < tl.where(partial < 0, 0, num_tokens)
        _store_rows(partial_out + place * BLOCK_V, acc, part, BLOCK_V, BLOCK_V)
        tl.store(partial_sum + place, top + tl.log2(total), mask=part)
        valid = row // FOLD < tl.where(partial < 0, num_tokens, 0)
    _store_rows(out + token.to(tl.int64) * out_token + heads * out_head, acc, valid, VALUE_DIM, BLOCK_V)


@triton.jit
def _attend(
    q, top, total, key, value, table, item, kv_len, low, high, start, valid, masks, positions, fed_from,
    multiplier, inner,
    SLOT: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, MODE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """The item's share of the keys: (weighted values [BLOCK_M, BLOCK_V], base-2 maximum, sum) in fp32."""
    bound = tl.max(high, 0)
    if MODE == TREE:
        bound = tl.minimum(tl.max(tl.where(valid, start, 0), 0) + 32 * WORDS, kv_len)
    clear_from = tl.max(tl.where(valid, low, 0), 0)  # every row sees every key from here
    clear_to = tl.min(tl.where(valid, high, kv_len), 0)  # to here
    lowest = tl.min(tl.where(valid, low, kv_len), 0) // BLOCK_N
    tiles = tl.maximum(tl.cdiv(bound, BLOCK_N) - lowest, 0)
    share = tl.cdiv(tiles, tl.load(item + 5))
    begin = lowest + tl.load(item + 4) * share
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for tile in range(begin, tl.minimum(begin + share, lowest + tiles)):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # Keys past the bound may never have been written: they are read as 0, for 0 * NaN is NaN.
        written = keys < bound
        slots = _slots(table, tile, bound, PAGE, BLOCK_N).to(tl.int64) * SLOT
        k = _load_rows(key + slots, written, KEY_DIM, BLOCK_K).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            score = 1.0 - 2.0 / (tl.exp2(score * inner) + 1.0)
        if (tile * BLOCK_N < clear_from) | (tile * BLOCK_N + BLOCK_N > clear_to):
            seen = _visible(keys, bound, low, high, start, valid, masks, positions, fed_from, MODE, WINDOW, WORDS)
            score = tl.where(seen, score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1) * multiplier)
        anchor = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key yet
        weight = tl.exp2(score * multiplier - anchor[:, None])
        fade = tl.exp2(top - anchor)
        total = total * fade + tl.sum(weight, 1)
        v = _load_rows(value + slots, written, VALUE_DIM, BLOCK_V).to(q.dtype)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = highest
    return acc, top, total


@triton.jit
def merge_splits(
    partial_out, partial_sum, out, merges, out_token, out_head,
    KV_HEADS: tl.constexpr, FOLD: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, MAX_SPLITS: tl.constexpr,
):
    """One row of one split tile: its parts, weighted by their sums, into `out`."""
    head = (tl.program_id(0) // BLOCK_M) % KV_HEADS
    merge = merges + (tl.program_id(0) // (BLOCK_M * KV_HEADS)) * ITEM_FIELDS
    first_token, num_tokens = tl.load(merge), tl.load(merge + 1)
    row = tl.load(merge + 2) * BLOCK_M + tl.program_id(0) % BLOCK_M
    if row // FOLD < num_tokens:
        splits = tl.load(merge + 4)
        place = (tl.load(merge + 3).to(tl.int64) * KV_HEADS + head) * BLOCK_M + tl.program_id(0) % BLOCK_M
        every = tl.arange(0, MAX_SPLITS)
        sums = partial_sum + place + every * (KV_HEADS * BLOCK_M)
        top = tl.max(tl.load(sums, mask=every < splits, other=float("-inf")), 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        dim = tl.arange(0, BLOCK_V)
        total = 0.0
        acc = tl.zeros([BLOCK_V], tl.float32)
        for first in range(0, splits, MERGE_CHUNK):
            part = first + tl.arange(0, MERGE_CHUNK)
            rows = place + part * (KV_HEADS * BLOCK_M)
            weight = tl.exp2(tl.load(partial_sum + rows, mask=part < splits, other=float("-inf")) - top)
            values = tl.load(
                partial_out + rows[:, None] * BLOCK_V + dim[None, :], mask=(part < splits)[:, None], other=0.0
            )
            acc += tl.sum(weight[:, None] * values, 0)
            total += tl.sum(weight, 0)
        acc = acc / tl.where(total > 0.0, total, 1.0)
        place_out = out + (first_token + row // FOLD).to(tl.int64) * out_token + (head * FOLD + row % FOLD) * out_head
        tl.store(place_out + dim, acc.to(out.dtype.element_ty), mask=dim < VALUE_DIM)
# fmt: on
