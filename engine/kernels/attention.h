/* Attention over the paged pool, read in place: what the parts share.

   A task is one key/value head's query rows of one sequence (or, for few rows, all heads of one sequence): every key and
   value is loaded once for all query heads of its group and all rows of the task. Rows are "folded": row r of a
   key/value head is query r / fold, head r % fold of the group, so that grouped heads look like more queries.
   The keys of few rows are cut into splits; each gives a maximum, a sum and unnormalised values (Milakov and Gimelshein
   2018; Dao et al. 2022), which the last split to finish joins in order.

   Splits, and the steps in which keys are taken, begin at fixed places. So a query's result depends on its own position
   and on the path it takes (few rows or many) alone: not on the other queries of its sequence, on what else is in the
   batch, or on the number of threads. Blocks that are verified take the path of single tokens. */
#pragma once

#include <stdatomic.h>

#include "vec.h"

#define FEW_TOKENS 16 /* queries of a sequence, and folded rows of a head, up to which it takes the path of few rows */
#define FEW_ROWS 128
#define FEW_SPLIT 512 /* keys of a split; FEW_KEYS are those of one step */
#define FEW_KEYS (2 * W)
#define TILE_ROWS 192 /* rows of a task of the path of many rows, and keys of one step */
#define TILE_KEYS 128
#define MR 6 /* the block of its sums that is kept in registers: rows, columns */
#define NR (2 * W)
#define LOG2E 1.44269504f

enum { CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, TREE };

/* One layer's call, mirrored by native.ATTENTION; the first fields by layout.PagedBatch. Rows are counted in elements. */
typedef struct {
    const int32_t *tables, *starts, *kv_lens;
    const int64_t *positions;
    const int32_t *tree_starts; /* of TREE: see runtime.batch.DeviceBatch */
    const uint64_t *tree_masks; /* [tokens][tree_words] */
    int64_t table_row, num_seqs, num_tokens, block_size;
    int64_t mode, block_length, tree_words;
    const float *query;
    const void *pool;
    const float *sinks; /* [heads] or null */
    float *out;         /* [tokens, heads, value_dim] */
    int64_t query_row, query_head, pool_row, num_slots;
    int64_t heads, kv_heads, key_dim, value_dim;
    int64_t window;       /* 0: none */
    float scale, softcap; /* softcap 0: none */
    int32_t pool_type;    /* 0: float, 1: half */
    int32_t threads;      /* of paged_attention */
} Problem;

typedef struct {
    int64_t low, high;
} Range;

typedef struct {
    int64_t seq, head, first_row, rows; /* folded rows of `head`; head -1: all heads, `rows` each */
    Range keys;                         /* what its rows see together */
    int64_t splits;
    float *partials;      /* [splits][rows of all heads][partial_width] if there are several splits */
    atomic_int remaining; /* splits that are not done yet; the last one sets it up for the next layer */
    int few;
} Task;

typedef struct {
    int32_t task, split;
} KeyUnit;

/* How a step's work is cut, for all layers that agree in heads, sizes and window. Lives in the caller's memory. */
typedef struct {
    int64_t fold;         /* query heads of a key/value head */
    int64_t value_stride; /* value_dim rounded up to what the matrix kernels write */
    int64_t num_tasks, num_units, partial_floats, products;
    int64_t result_floats, packed_floats; /* of each thread's scratch: results of a unit, and what its path packs */
    Task *tasks;
    KeyUnit *units;
    float *scratch, *partials;
    int by_head;      /* few sequences of few rows: each head is a task, so that all threads have work */
    atomic_int stray; /* set if a sequence reaches outside its block table or the pool */
} Plan;

/* A layer under a plan, as one thread sees it. */
typedef struct {
    const Problem *problem;
    int64_t fold, value_stride;
    atomic_int *stray;
} Layer;

/* For teams of threads that exist already. One thread makes the plan of a step, in `space`, 64-byte aligned memory of
   attention_space bytes (-1: a sequence reaches outside the batch); then for each layer every thread calls
   attention_work, with one counter that starts at 0. Nothing is allocated. */
int64_t attention_space(const Problem *problem, int threads);
void attention_plan(Plan *plan, const Problem *problem, int threads, void *space);
void attention_work(Plan *plan, const Problem *layer, atomic_llong *next, int thread);
int attention_stray(const Plan *plan);

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

/* One past the last key that a query of mode TREE sees. */
INLINE int64_t tree_end(const Problem *p, int64_t token) {
    for (int64_t word = p->tree_words - 1; word >= 0; word--) {
        uint64_t bits = p->tree_masks[token * p->tree_words + word];
        if (bits) return p->tree_starts[token] + 64 * word + 64 - __builtin_clzll(bits);
    }
    return p->tree_starts[token];
}

/* Keys that a query of a sequence sees: a contiguous range, and one that only moves up, in every mode but TREE, where
   `hide` takes keys out of it. */
INLINE Range visible(const Problem *p, int64_t seq, int64_t token) {
    int64_t position = p->positions[token], kv_len = p->kv_lens[seq];
    Range seen = {0, kv_len};
    if (p->mode == CAUSAL) seen.high = min64(kv_len, position + 1);
    if (p->mode == BLOCK_CAUSAL) seen.high = min64(kv_len, (position / p->block_length + 1) * p->block_length);
    if (p->mode == TREE) seen.high = min64(kv_len, tree_end(p, token));
    if (p->window) {
        seen.low = max64(0, position - p->window + 1);
        if (p->mode == BLOCK_CAUSAL || p->mode == BIDIRECTIONAL) seen.high = min64(seen.high, position + p->window);
    }
    seen.low = min64(seen.low, seen.high);
    return seen;
}

INLINE int64_t token_of(const Layer *layer, const Task *task, int64_t row) {
    return layer->problem->starts[task->seq] + (task->first_row + row) / layer->fold;
}

/* The range of a folded row of a task. */
INLINE Range row_range(const Layer *layer, const Task *task, int64_t row) {
    return visible(layer->problem, task->seq, token_of(layer, task, row));
}

/* The part of a range that lies in keys [first, first + count), counted from `first`; empty if low >= high. */
INLINE Range part_of(Range seen, int64_t first, int64_t count) {
    return (Range){max64(seen.low - first, 0), min64(seen.high - first, count)};
}

INLINE const float *query_of(const Layer *layer, const Task *task, int64_t head, int64_t row) {
    const Problem *p = layer->problem;
    int64_t folded = task->first_row + row, token = p->starts[task->seq] + folded / layer->fold;
    return p->query + token * p->query_row + (head * layer->fold + folded % layer->fold) * p->query_head;
}

/* Pool rows of keys [begin, end) of a sequence. */
INLINE void pool_rows(const Layer *layer, int64_t seq, int64_t begin, int64_t end, const char **rows) {
    const Problem *p = layer->problem;
    const int32_t *table = p->tables + seq * p->table_row;
    int64_t page = begin / p->block_size, offset = begin % p->block_size;
    int64_t step = p->pool_row * (p->pool_type ? 2 : 4);
    while (begin < end) {
        int64_t block = page < p->table_row ? table[page] : -1;
        if (block < 0 || block >= p->num_slots / p->block_size) {
            atomic_store(layer->stray, 1);
            block = 0;
        }
        const char *row = (const char *)p->pool + (block * p->block_size + offset) * step;
        for (; begin < end && offset < p->block_size; begin++, offset++, row += step) *rows++ = row;
        page++;
        offset = 0;
    }
}

/* W elements of a pool row from element i on; and of the last of its elements, which are fewer. */
INLINE vec load_entry(const char *row, int64_t i, const int half) {
    return half ? v_load_half((const uint16_t *)row + i) : v_load((const float *)row + i);
}
INLINE vec load_first(const char *row, int64_t i, int64_t n, const int half) {
    return half ? v_load_half_first((const uint16_t *)row + i, n) : v_load_at((const float *)row + i, v_first(n));
}

/* Bit i: whether the query sees key + i, of the W keys from `key` on; for keys in its range. */
INLINE uint32_t tree_bits(const Problem *p, int64_t seq, int64_t token, int64_t key) {
    int64_t node = key - p->tree_starts[token], word = node >> 6, shift = node & 63;
    const uint64_t *masks = p->tree_masks + token * p->tree_words;
    uint64_t low = word < 0 ? ~0ull : word < p->tree_words ? masks[word] : 0;
    uint64_t high = word + 1 < 0 ? ~0ull : word + 1 < p->tree_words ? masks[word + 1] : 0;
    uint64_t bits = shift ? low >> shift | high << (64 - shift) : low;
    int64_t first = p->starts[seq], fed = p->kv_lens[seq] - (p->starts[seq + 1] - first); /* the first query's place */
    if (p->window)
        for (int64_t i = max64(0, fed - key); i < W && key + i < p->kv_lens[seq]; i++)
            if (p->positions[first + key + i - fed] <= p->positions[token] - p->window) bits &= ~(1ull << i);
    return (uint32_t)bits;
}

/* Put `value` in place of the scores of keys that a tree hides; scores[i] is key first + i. */
INLINE void hide(const Problem *p, int64_t seq, int64_t token, int64_t first, Range seen, float *scores, float value) {
    if (p->mode != TREE) return;
    int64_t from = p->tree_starts[token];
    if (p->window) from = min64(from, p->kv_lens[seq] - (p->starts[seq + 1] - p->starts[seq]));
    for (int64_t i = max64(seen.low, from - first) / W * W; i < seen.high; i += W)
        v_store(scores + i, v_where(v_lanes(tree_bits(p, seq, token, first + i)), v_load(scores + i), v_set(value)));
}

/* Three steps turn a row's scores with keys [0, count), of which it sees `seen`, into weights, each for all rows of a
   block, so that no row waits for another's sum across lanes.

   First: cap the scores. */
INLINE void cap(float *scores, Range seen, float softcap) {
    if (softcap > 0.0f)
        for (int64_t i = seen.low / W * W; i < seen.high; i += W)
            v_store(scores + i, v_mul(v_set(softcap * LOG2E), v_tanh(v_mul(v_load(scores + i), v_set(1.0f / softcap)))));
}

/* Second: put -inf where an edge vector reaches out of sight; gives the largest. NaN is passed over. */
INLINE float highest(float *scores, Range seen) {
    int64_t begin = seen.low / W * W, end = round_up(seen.high, W), last = end - W;
    const vec none = v_set(-INFINITY);
    if (seen.low >= seen.high) return -INFINITY;
    if (begin < seen.low)
        v_store(scores + begin, v_where(v_between(seen.low - begin, W), v_load(scores + begin), none));
    if (seen.high < end) v_store(scores + last, v_where(v_first(seen.high - last), v_load(scores + last), none));
    vec most = none;
    for (int64_t i = begin; i < end; i += W) most = v_max(v_load(scores + i), most);
    return v_max_of(most);
}

/* Third: weights relative to the largest score up to now, 0 out of sight. `maximum` and `sum` go on from what they
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
void attend_few(const Layer *layer, const Task *task, Range keys, Gathered *done, float *scratch);
void attend_tile(const Layer *layer, const Task *task, Range keys, Gathered *done, float *scratch);
