/* Few query rows (decode): bound by memory. Keys are taken as dot products straight from the pool, all heads of a slot
   one after another, so that a slot's row streams in once and in order. */
#include "attention.h"

/* Ask for the next step's row while this one's is worked on. */
INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T1);
}

/* Scores of `rows` (1 to 3) query rows [stride] with 4 keys; key's tail lanes are not read. */
INLINE void dots(const float *query, int64_t stride, const int rows, const char *const *keys, int64_t offset,
                 int64_t width, const int half, float *scores) {
    vec sums[3][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) sums[r][k] = v_zero();
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        vec key[4];
        for (int k = 0; k < 4; k++) key[k] = load_entry(keys[k], offset + i, half);
        for (int r = 0; r < rows; r++) {
            vec q = v_load(query + r * stride + i);
            for (int k = 0; k < 4; k++) sums[r][k] = v_fma(q, key[k], sums[r][k]);
        }
    }
    if (i < width) {
        vec key[4];
        for (int k = 0; k < 4; k++) key[k] = load_first(keys[k], offset + i, width - i, half);
        for (int r = 0; r < rows; r++) {
            vec q = v_load(query + r * stride + i);
            for (int k = 0; k < 4; k++) sums[r][k] = v_fma(q, key[k], sums[r][k]);
        }
    }
    for (int r = 0; r < rows; r++)
        _mm_storeu_ps(scores + r * FEW_KEYS, v_sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

/* out[r][0 .. n vectors) = out * factor + sum over keys of weight * value; of the last vector `last` lanes exist. */
INLINE void mix(float *out, int64_t stride, const int rows, const int n, const char *const *values, int64_t offset,
                int64_t count, const float *weights, const float *factors, const int half, const int64_t last) {
    vec sums[3][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) sums[r][c] = v_mul(v_load(out + r * stride + c * W), v_set(factors[r]));
    for (int64_t k = 0; k < count; k++) {
        vec weight[3]; /* these, one value and 12 sums just fit the 16 registers of AVX2 */
        for (int r = 0; r < rows; r++) weight[r] = v_set(weights[r * FEW_KEYS + k]);
        for (int c = 0; c < n; c++) {
            vec value = last < W ? load_first(values[k], offset + c * W, last, half)
                                 : load_entry(values[k], offset + c * W, half);
            for (int r = 0; r < rows; r++) sums[r][c] = v_fma(weight[r], value, sums[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) v_store(out + r * stride + c * W, sums[r][c]);
}

/* One head's values for up to 3 rows: whole vectors in panels of 4, then the rest. */
INLINE void mix_row(float *out, int64_t stride, const int rows, const char *const *values, int64_t offset,
                    int64_t width, int64_t count, const float *weights, const float *factors, const int half) {
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
        mix(out + i, stride, rows, 4, values, offset + i, count, weights, factors, half, W);
    for (; i + W <= width; i += W) mix(out + i, stride, rows, 1, values, offset + i, count, weights, factors, half, W);
    if (i < width) mix(out + i, stride, rows, 1, values, offset + i, count, weights, factors, half, width - i);
}

typedef struct {
    const char *const *now, *const *next; /* pool rows of this step's and the next step's keys, FEW_KEYS each */
    int64_t first, count, next_count;     /* this step's first key */
    Range seen[FEW_ROWS];                 /* what each row sees of this step */
} KeyStep;

INLINE void step_of_head(const Layer *layer, const Task *task, int64_t head, int64_t at, const KeyStep *step,
                         const float *query, const Gathered *done, const int half) {
    const Problem *p = layer->problem;
    float scores[FEW_ROWS * FEW_KEYS], most[FEW_ROWS], factors[FEW_ROWS];
    int64_t rows = task->rows, stride = round_up(p->key_dim, W), size = half ? 2 : 4;
    int64_t key_at = head * p->key_dim, value_at = p->kv_heads * p->key_dim + head * p->value_dim;
    for (int64_t k = 0; k < step->count; k += 4) {
        for (int64_t j = k; j < min64(k + 4, step->next_count); j++) fetch(step->next[j] + key_at * size, p->key_dim * size);
        for (int64_t r = 0; r < rows; r += 3) {
            const float *q = query + r * stride;
            float *to = scores + r * FEW_KEYS + k;
            if (rows - r >= 3) dots(q, stride, 3, step->now + k, key_at, p->key_dim, half, to);
            else if (rows - r == 2) dots(q, stride, 2, step->now + k, key_at, p->key_dim, half, to);
            else dots(q, stride, 1, step->now + k, key_at, p->key_dim, half, to);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float *own = scores + r * FEW_KEYS;
        cap(own, step->seen[r], p->softcap);
        hide(p, task->seq, token_of(layer, task, r), step->first, step->seen[r], own, -INFINITY);
        most[r] = highest(own, step->seen[r]);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *own = scores + r * FEW_KEYS;
        factors[r] = weigh(own, step->count, step->seen[r], most[r], done->maxima + at + r, done->sums + at + r);
        hide(p, task->seq, token_of(layer, task, r), step->first, step->seen[r], own, 0.0f);
    }
    for (int64_t j = 0; j < step->next_count; j++) fetch(step->next[j] + value_at * size, p->value_dim * size);
    for (int64_t r = 0; r < rows; r += 3) {
        float *out = done->values + (at + r) * done->stride;
        const float *weights = scores + r * FEW_KEYS, *by = factors + r;
        int64_t width = p->value_dim, n = step->count;
        if (rows - r >= 3) mix_row(out, done->stride, 3, step->now, value_at, width, n, weights, by, half);
        else if (rows - r == 2) mix_row(out, done->stride, 2, step->now, value_at, width, n, weights, by, half);
        else mix_row(out, done->stride, 1, step->now, value_at, width, n, weights, by, half);
    }
}

INLINE void few_keys(const Layer *layer, const Task *task, Range keys, Gathered *done, float *query, const int half) {
    const Problem *p = layer->problem;
    const char *pointers[2][FEW_KEYS];
    Range seen[FEW_ROWS];
    int64_t rows = task->rows, stride = round_up(p->key_dim, W), width = p->kv_heads * (p->key_dim + p->value_dim);
    int64_t first = task->head < 0 ? 0 : task->head, heads = task->head < 0 ? p->kv_heads : 1;
    for (int64_t row = 0; row < rows; row++) seen[row] = row_range(layer, task, row);
    KeyStep step = {.count = min64(FEW_KEYS, keys.high - keys.low)};
    pool_rows(layer, task->seq, keys.low, keys.low + step.count, pointers[0]);
    if (task->head < 0)
        for (int64_t k = 0; k < step.count; k++) fetch(pointers[0][k], width * (half ? 2 : 4));
    for (int turn = 0; keys.low < keys.high; turn ^= 1) {
        int64_t after = keys.low + step.count;
        step.now = pointers[turn];
        step.next = pointers[turn ^ 1];
        step.first = keys.low;
        step.next_count = min64(FEW_KEYS, keys.high - after);
        for (int64_t row = 0; row < rows; row++) step.seen[row] = part_of(seen[row], keys.low, step.count);
        for (int64_t k = step.count; k < round_up(step.count, 4); k++) pointers[turn][k] = pointers[turn][0];
        pool_rows(layer, task->seq, after, after + step.next_count, pointers[turn ^ 1]);
        for (int64_t head = 0; head < heads; head++)
            step_of_head(layer, task, first + head, head * rows, &step, query + head * rows * stride, done, half);
        keys.low = after;
        step.count = step.next_count;
    }
}

void attend_few(const Layer *layer, const Task *task, Range keys, Gathered *done, float *query) {
    const Problem *p = layer->problem;
    int64_t rows = task->rows, stride = round_up(p->key_dim, W), heads = task->head < 0 ? p->kv_heads : 1;
    float by = p->softcap > 0.0f ? p->scale : p->scale * LOG2E;
    for (int64_t row = 0; row < heads * rows; row++) {
        const float *from = query_of(layer, task, task->head < 0 ? row / rows : task->head, row % rows);
        scaled(query + row * stride, from, by, p->key_dim, stride);
    }
    if (p->pool_type) few_keys(layer, task, keys, done, query, 1);
    else few_keys(layer, task, keys, done, query, 0);
}
