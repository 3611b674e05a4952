/* From a merged query/key/value product to normed and rotated queries, and keys and values in the pool. */
#include <stdatomic.h>
#include <string.h>

#include "norms.h"
#include "rows.h"

/* Mirrored by native.ROPE_WRITE. Rows are counted in floats. */
typedef struct {
    const float *qkv, *cos, *sin; /* cos and sin may be null with rotary = 0 */
    const float *query_norm, *key_norm; /* or null */
    const int64_t *slots;
    float *query, *pool;
    int64_t qkv_row, cos_row, sin_row, pool_row, rows, num_slots;
    int64_t heads, kv_heads, key_dim, value_dim, rotary;
    int64_t query_norm_width, key_norm_width; /* what one norm is taken over */
    float eps, offset;
    int32_t interleaved, threads;
} RopeWrite;

typedef struct {
    const RopeWrite *task;
    atomic_int *stray; /* set if a slot lies outside the pool */
} Shared;

/* x_i cos_i - x_j sin_i, x_j cos_j + x_i sin_j for the pairs (i, j = i + half) */
INLINE void rotate_halves(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; i += W) {
        lanes m = v_first(half - i);
        vec a = v_load_at(x + i, m), b = v_load_at(x + half + i, m);
        v_store_at(x + i, v_fnma(b, v_load_at(sin + i, m), v_mul(a, v_load_at(cos + i, m))), m);
        v_store_at(x + half + i, v_fma(a, v_load_at(sin + half + i, m), v_mul(b, v_load_at(cos + half + i, m))), m);
    }
}

/* The same for the pairs (0, 1), (2, 3), ... */
INLINE void rotate_pairs(float *x, const float *cos, const float *sin, int64_t width) {
    for (int64_t i = 0; i < width; i += W) {
        lanes m = v_first(width - i);
        vec a = v_load_at(x + i, m), turned = v_mul(v_swap_pairs(a), v_load_at(sin + i, m));
        v_store_at(x + i, v_fma_addsub(a, v_load_at(cos + i, m), turned), m);
    }
}

static void section(const RopeWrite *a, float *out, const float *in, int64_t heads, const float *norm, int64_t width,
                    int64_t row) {
    int64_t total = heads * a->key_dim;
    if (norm)
        for (int64_t i = 0; i < total; i += width)
            rms_apply(out + i, in + i, norm, width, rms_scale(in + i, width, a->eps), a->offset);
    else
        memcpy(out, in, total * sizeof(float));
    if (!a->rotary) return;
    const float *cos = a->cos + row * a->cos_row, *sin = a->sin + row * a->sin_row;
    for (int64_t head = 0; head < heads; head++) {
        float *x = out + head * a->key_dim;
        if (a->interleaved)
            rotate_pairs(x, cos, sin, a->rotary);
        else
            rotate_halves(x, cos, sin, a->rotary / 2);
    }
}

static void rope_rows(const void *arguments, int64_t begin, int64_t end) {
    const Shared *shared = arguments;
    const RopeWrite *a = shared->task;
    int64_t query_width = a->heads * a->key_dim, key_width = a->kv_heads * a->key_dim;
    for (int64_t row = begin; row < end; row++) {
        const float *in = a->qkv + row * a->qkv_row;
        section(a, a->query + row * query_width, in, a->heads, a->query_norm, a->query_norm_width, row);
        if (a->slots[row] < 0 || a->slots[row] >= a->num_slots) {
            atomic_store(shared->stray, 1);
            continue;
        }
        float *slot = a->pool + a->slots[row] * a->pool_row;
        section(a, slot, in + query_width, a->kv_heads, a->key_norm, a->key_norm_width, row);
        memcpy(slot + key_width, in + query_width + key_width, a->kv_heads * a->value_dim * sizeof(float));
    }
}

/* 0, or 1 if a slot lies outside the pool (the other rows are done). */
EXPORT int head_norm_rope_write(const RopeWrite *task) {
    atomic_int stray = 0;
    Shared shared = {task, &stray};
    int64_t width = (task->heads + task->kv_heads) * task->key_dim + task->kv_heads * task->value_dim;
    over_rows(rope_rows, &shared, task->rows, 2 * width, task->threads);
    return atomic_load(&stray);
}
