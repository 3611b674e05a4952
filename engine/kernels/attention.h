/* Attention over the paged pool, read in place: what the parts share.

   A task is one key/value head's query rows of one sequence (or, for few rows, all heads of one sequence): every key and
   value is loaded once for all query heads of its group and all rows of the tile. Rows are "folded": row r of a
   key/value head is query r / fold, head r % fold of the group, so that grouped heads look like more queries.
   A long key range is cut into splits; each gives a maximum, a sum and unnormalised values (Milakov and Gimelshein
   2018; Dao et al. 2022), which the last split to finish joins in order. How a task is cut follows from its own
   sequence alone, so a result never depends on what else is in the batch, or on the number of threads. */
#pragma once

#include <stdatomic.h>

#include "vec.h"

#define FEW_ROWS 8  /* folded rows of a head up to which keys are taken as dot products */
#define FEW_KEYS 16 /* keys of one step of the few-rows path */
#define MR 6        /* block of the many-rows path that is kept in registers: rows, columns */
#define NR (2 * W)
#define TILE_ROWS 192 /* rows and keys of one step of it */
#define TILE_KEYS 128
#define LOG2E 1.44269504f

/* Mirrored by native.ATTENTION; the first ten fields by layout.PagedBatch. Rows are counted in floats. */
typedef struct {
    const int32_t *tables, *starts, *kv_lens;
    const int64_t *positions;
    int64_t table_row, num_seqs, num_tokens, block_size;
    int64_t mode, block_length; /* mode: 0 causal, 1 block-causal, 2 bidirectional */
    const float *query, *pool, *sinks; /* sinks [heads] or null */
    float *out;                        /* [tokens, heads, value_dim] */
    int64_t query_row, query_head, pool_row, num_slots;
    int64_t heads, kv_heads, key_dim, value_dim;
    int64_t window;       /* 0: none */
    float scale, softcap; /* softcap 0: none */
    int32_t threads;
} Problem;

typedef struct {
    int64_t low, high;
} Range;

typedef struct {
    int64_t seq, head, first_row, rows; /* folded rows of `head`; head -1: all heads, `rows` each */
    Range keys;                         /* what its rows see together */
    int64_t splits, split_keys;
    float *partials;      /* [splits][rows of all heads][partial_width] if there are several splits */
    atomic_int remaining; /* splits that are not done yet */
} Task;

typedef struct {
    const Problem *problem;
    int64_t fold;         /* query heads of a key/value head */
    int64_t value_stride; /* value_dim rounded up to what the matrix kernels write */
    int64_t scratch_floats;
    atomic_int stray; /* set if a sequence reaches outside its block table or the pool */
} Plan;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

/* Keys that the query at `position` sees: a contiguous range in every mode, and one that only moves up. */
INLINE Range visible(const Problem *p, int64_t position, int64_t kv_len) {
    Range seen = {0, kv_len};
    if (p->mode == 0) seen.high = min64(kv_len, position + 1);
    if (p->mode == 1) seen.high = min64(kv_len, (position / p->block_length + 1) * p->block_length);
    if (p->window) {
        seen.low = max64(0, position - p->window + 1);
        if (p->mode != 0) seen.high = min64(seen.high, position + p->window);
    }
    seen.high = max64(seen.high, seen.low);
    return seen;
}

/* The range of a folded row of a task. */
INLINE Range row_range(const Plan *plan, const Task *task, int64_t row) {
    const Problem *p = plan->problem;
    int64_t token = p->starts[task->seq] + (task->first_row + row) / plan->fold;
    return visible(p, p->positions[token], p->kv_lens[task->seq]);
}

/* The part of a range that lies in keys [first, first + count), counted from `first`; empty if low >= high. */
INLINE Range part_of(Range seen, int64_t first, int64_t count) {
    return (Range){max64(seen.low - first, 0), min64(seen.high - first, count)};
}

INLINE const float *query_of(const Plan *plan, const Task *task, int64_t head, int64_t row) {
    const Problem *p = plan->problem;
    int64_t folded = task->first_row + row, token = p->starts[task->seq] + folded / plan->fold;
    return p->query + token * p->query_row + (head * plan->fold + folded % plan->fold) * p->query_head;
}

/* Pool rows of keys [begin, end) of a sequence. */
INLINE void pool_rows(Plan *plan, int64_t seq, int64_t begin, int64_t end, const float **rows) {
    const Problem *p = plan->problem;
    const int32_t *table = p->tables + seq * p->table_row;
    int64_t page = begin / p->block_size, offset = begin % p->block_size;
    while (begin < end) {
        int64_t block = page < p->table_row ? table[page] : -1;
        if (block < 0 || block >= p->num_slots / p->block_size) {
            atomic_store(&plan->stray, 1);
            block = 0;
        }
        const float *row = p->pool + (block * p->block_size + offset) * p->pool_row;
        for (; begin < end && offset < p->block_size; begin++, offset++, row += p->pool_row) *rows++ = row;
        page++;
        offset = 0;
    }
}

/* Two steps turn a row's scores with keys [0, count), of which it sees `seen`, into weights: first for all rows of a
   block, then the second, so that no row waits for another's sum across lanes.

   First: cap the scores, put -inf where an edge vector reaches out of sight; gives the largest. NaN is passed over. */
INLINE float highest(float *scores, Range seen, float softcap) {
    int64_t begin = seen.low / W * W, end = round_up(seen.high, W), last = end - W;
    const vec none = v_set(-INFINITY);
    if (seen.low >= seen.high) return -INFINITY;
    if (softcap > 0.0f)
        for (int64_t i = begin; i < end; i += W)
            v_store(scores + i, v_mul(v_set(softcap * LOG2E), v_tanh(v_mul(v_load(scores + i), v_set(1.0f / softcap)))));
    if (begin < seen.low)
        v_store(scores + begin, v_where(v_between(seen.low - begin, W), v_load(scores + begin), none));
    if (seen.high < end) v_store(scores + last, v_where(v_first(seen.high - last), v_load(scores + last), none));
    vec most = none;
    for (int64_t i = begin; i < end; i += W) most = v_max(v_load(scores + i), most);
    return v_max_of(most);
}

/* Second: weights relative to the largest score up to now, 0 out of sight. `maximum` and `sum` go on from what they
   were; the result is the factor for what was summed before. Scores are in units of log 2. */
INLINE float weigh(float *scores, int64_t count, Range seen, float most, float *maximum, float *sum) {
    int64_t begin = seen.low / W * W, end = round_up(seen.high, W), last = end - W;
    if (seen.low >= seen.high) begin = end = 0;
    float before = *maximum, now = most > before ? most : before;
    vec shift = v_set(now == -INFINITY ? 0.0f : now), total = v_zero(); /* -inf: nothing but NaN and -inf yet */
    for (int64_t i = 0; i < begin; i += W) v_store(scores + i, v_zero());
    for (int64_t i = begin; i < end; i += W) {
        vec weight = v_exp2(v_sub(v_load(scores + i), shift));
        v_store(scores + i, weight);
        total = v_add(total, weight);
    }
    for (int64_t i = end; i < count; i += W) v_store(scores + i, v_zero());
    /* The 2^-125 that come from -inf are lost in the sum, which is at least 1, but must not meet a value. */
    if (begin < seen.low && begin < end)
        v_store(scores + begin, v_where(v_first(seen.low - begin), v_zero(), v_load(scores + begin)));
    if (seen.high < end) v_store(scores + last, v_where(v_first(seen.high - last), v_load(scores + last), v_zero()));
    float factor = before == now ? 1.0f : v_lowest(v_exp2(v_set(before - now)));
    *sum = *sum * factor + v_sum_of(total);
    *maximum = now;
    return factor;
}

/* to = from * by, for n floats; then zeros up to `room`. */
INLINE void scaled(float *restrict to, const float *restrict from, float by, int64_t n, int64_t room) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i] * by;
    for (int64_t i = n; i < room; i++) to[i] = 0.0f;
}

/* Rows of unnormalised values with their maxima and sums. */
typedef struct {
    float *values; /* [rows][stride] */
    float *maxima, *sums;
    int64_t stride;
} Gathered;

/* Each fills the first `rows` rows of `done` (of every head, if the task is for all heads) from keys [begin, end). */
void attend_few(Plan *plan, const Task *task, Range keys, Gathered *done, float *scratch);
void attend_tile(Plan *plan, const Task *task, Range keys, Gathered *done, float *scratch);
