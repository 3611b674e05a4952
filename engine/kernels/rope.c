/* Norm and rotation of rows, and their way into the pool. */
#include <stdatomic.h>
#include <string.h>

#include "norms.h"
#include "rope.h"
#include "rows.h"

/* One head of a row: its numbers, its part of a norm's weight (or null), and that norm's scale. */
typedef struct {
    const float *in, *norm;
    float scale, offset;
} RopeHead;

/* The n first lanes of W numbers from i on, normed. */
INLINE vec rope_load(const RopeHead *head, int64_t i, int64_t n) {
    lanes m = v_first(n);
    vec x = n >= W ? v_load(head->in + i) : v_load_at(head->in + i, m);
    if (!head->norm) return x;
    vec weight = n >= W ? v_load(head->norm + i) : v_load_at(head->norm + i, m);
    return v_mul(v_mul(x, v_set(head->scale)), v_add(weight, v_set(head->offset)));
}

INLINE vec rope_factor(const float *table, int64_t i, int64_t n) {
    return n >= W ? v_load(table + i) : v_load_at(table + i, v_first(n));
}

/* A finite number beyond the largest half becomes that, not infinity, which one key would carry into every sum;
   infinity and NaN stay what they are. */
INLINE vec rope_bounded(vec x) {
    vec near = v_min(v_set(65504.0f), v_max(v_set(-65504.0f), x));
    return v_where(v_less(v_set(3.4028235e38f), v_abs(x)), x, near);
}

INLINE void rope_store(void *out, int64_t i, vec x, int64_t n, const int half) {
    if (half && n >= W) v_store_half((uint16_t *)out + i, rope_bounded(x));
    else if (half) v_store_half_first((uint16_t *)out + i, rope_bounded(x), n);
    else if (n >= W) v_store((float *)out + i, x);
    else v_store_at((float *)out + i, x, v_first(n));
}

/* x_i cos_i - x_j sin_i, x_j cos_j + x_i sin_j for the pairs (i, j = i + half), or for (0, 1), (2, 3) ...; the rest
   of the head as it is. */
INLINE void rope_head(const RopeWrite *a, const RopeHead *head, const float *cos, const float *sin, void *out,
                      const int half) {
    int64_t pairs = a->rotary / 2;
    if (a->interleaved)
        for (int64_t i = 0; i < a->rotary; i += W) {
            int64_t n = a->rotary - i;
            vec x = rope_load(head, i, n), turned = v_mul(v_swap_pairs(x), rope_factor(sin, i, n));
            rope_store(out, i, v_fma_addsub(x, rope_factor(cos, i, n), turned), n, half);
        }
    else
        for (int64_t i = 0; i < pairs; i += W) {
            int64_t n = pairs - i, j = pairs + i;
            vec x = rope_load(head, i, n), y = rope_load(head, j, n);
            vec left = v_fnma(y, rope_factor(sin, i, n), v_mul(x, rope_factor(cos, i, n)));
            vec right = v_fma(x, rope_factor(sin, j, n), v_mul(y, rope_factor(cos, j, n)));
            rope_store(out, i, left, n, half);
            rope_store(out, j, right, n, half);
        }
    for (int64_t i = a->rotary; i < a->key_dim; i += W)
        rope_store(out, i, rope_load(head, i, a->key_dim - i), a->key_dim - i, half);
}

/* Heads that lie one after another; `width`: what one norm is taken over, a whole number of heads. */
INLINE void rope_heads(const RopeWrite *a, int64_t row, const float *in, int64_t heads, const float *norm,
                       int64_t width, void *out, const int half) {
    const float *cos = a->cos + row * a->cos_row, *sin = a->sin + row * a->sin_row;
    RopeHead head = {.offset = a->offset};
    for (int64_t i = 0; i < heads; i++) {
        int64_t at = i * a->key_dim;
        head.in = in + at;
        if (norm && at % width == 0) head.scale = rms_scale(head.in, width, a->eps);
        head.norm = norm ? norm + at % width : 0;
        rope_head(a, &head, cos, sin, (char *)out + at * (half ? 2 : 4), half);
    }
}

INLINE void rope_keys(const RopeWrite *a, int64_t row, const float *key, const int half) {
    int64_t key_width = a->kv_heads * a->key_dim, value_width = a->kv_heads * a->value_dim, size = half ? 2 : 4;
    char *slot = (char *)a->pool + a->slots[row] * a->pool_row * size;
    rope_heads(a, row, key, a->kv_heads, a->key_norm, a->key_norm_width, slot, half);
    const float *value = key + key_width;
    for (int64_t i = 0; i < value_width; i += W) {
        int64_t n = value_width - i;
        vec x = n >= W ? v_load(value + i) : v_load_at(value + i, v_first(n));
        rope_store(slot + key_width * size, i, x, n, half);
    }
}

int rope_write_rows(const RopeWrite *a, int64_t begin, int64_t end) {
    int64_t query_width = a->heads * a->key_dim;
    int stray = 0;
    for (int64_t row = begin; row < end; row++) {
        const float *in = a->qkv + row * a->qkv_row;
        rope_heads(a, row, in, a->heads, a->query_norm, a->query_norm_width, a->query + row * query_width, 0);
        if (a->slots[row] < 0 || a->slots[row] >= a->num_slots) stray = 1;
        else if (a->pool_type) rope_keys(a, row, in + query_width, 1);
        else rope_keys(a, row, in + query_width, 0);
    }
    return stray;
}

typedef struct {
    const RopeWrite *task;
    atomic_int stray;
} RopeShared;

static void rope_part(const void *arguments, int64_t begin, int64_t end) {
    RopeShared *shared = (RopeShared *)arguments;
    if (rope_write_rows(shared->task, begin, end)) atomic_store(&shared->stray, 1);
}

/* 0, or 1 if a slot lies outside the pool (the other rows are done). */
EXPORT int head_norm_rope_write(const RopeWrite *task) {
    RopeShared shared = {task, 0};
    int64_t width = (task->heads + task->kv_heads) * task->key_dim + task->kv_heads * task->value_dim;
    over_rows(rope_part, &shared, task->rows, 2 * width, task->threads);
    return atomic_load(&shared.stray);
}
