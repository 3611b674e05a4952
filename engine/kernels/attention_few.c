/* Few query rows (decode): bound by memory. Keys are taken as dot products straight from the pool, all heads of a slot
   one after another, so that a slot's row streams in once and in order. */
#include "attention.h"

/* Ask for the next step's row while this one's is worked on. */
INLINE void fetch(const float *row, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) _mm_prefetch((const char *)(row + i), _MM_HINT_T1);
}

/* Scores of `rows` (1 to 3) query rows [stride] with 4 keys; key's tail lanes are not read. */
INLINE void dots(const float *query, int64_t stride, const int rows, const float *const *keys, int64_t offset,
                 int64_t width, float *scores) {
    vec sums[3][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) sums[r][k] = v_zero();
    const float *k0 = keys[0] + offset, *k1 = keys[1] + offset, *k2 = keys[2] + offset, *k3 = keys[3] + offset;
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        vec key[4] = {v_load(k0 + i), v_load(k1 + i), v_load(k2 + i), v_load(k3 + i)};
        for (int r = 0; r < rows; r++) {
            vec q = v_load(query + r * stride + i);
            for (int k = 0; k < 4; k++) sums[r][k] = v_fma(q, key[k], sums[r][k]);
        }
    }
    if (i < width) {
        lanes m = v_first(width - i);
        vec key[4] = {v_load_at(k0 + i, m), v_load_at(k1 + i, m), v_load_at(k2 + i, m), v_load_at(k3 + i, m)};
        for (int r = 0; r < rows; r++) {
            vec q = v_load(query + r * stride + i);
            for (int k = 0; k < 4; k++) sums[r][k] = v_fma(q, key[k], sums[r][k]);
        }
    }
    for (int r = 0; r < rows; r++)
        _mm_storeu_ps(scores + r * FEW_KEYS, v_sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

/* out[r][0 .. n vectors) = out * factor + sum over keys of weight * value; the last vector is cut to `m`. */
INLINE void mix(float *out, int64_t stride, const int rows, const int n, const float *const *values, int64_t offset,
                int64_t count, const float *weights, const float *factors, const int cut, lanes m) {
    vec sums[3][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) sums[r][c] = v_mul(v_load(out + r * stride + c * W), v_set(factors[r]));
    for (int64_t k = 0; k < count; k++) {
        const float *from = values[k] + offset;
        vec weight[3]; /* these, one value and 12 sums just fit the 16 registers of AVX2 */
        for (int r = 0; r < rows; r++) weight[r] = v_set(weights[r * FEW_KEYS + k]);
        for (int c = 0; c < n; c++) {
            vec value = cut ? v_load_at(from + c * W, m) : v_load(from + c * W);
            for (int r = 0; r < rows; r++) sums[r][c] = v_fma(weight[r], value, sums[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) v_store(out + r * stride + c * W, sums[r][c]);
}

/* One head's values for up to 3 rows: whole vectors in panels of 4, then the rest. */
INLINE void mix_row(float *out, int64_t stride, const int rows, const float *const *values, int64_t offset,
                    int64_t width, int64_t count, const float *weights, const float *factors) {
    int64_t i = 0;
    const lanes all = v_first(W);
    for (; i + 4 * W <= width; i += 4 * W)
        mix(out + i, stride, rows, 4, values, offset + i, count, weights, factors, 0, all);
    for (; i + W <= width; i += W) mix(out + i, stride, rows, 1, values, offset + i, count, weights, factors, 0, all);
    if (i < width) mix(out + i, stride, rows, 1, values, offset + i, count, weights, factors, 1, v_first(width - i));
}

typedef struct {
    const float *const *now, *const *next; /* pool rows of this step's and the next step's keys, FEW_KEYS each */
    int64_t count, next_count;
    Range seen[FEW_ROWS]; /* what each row sees of this step */
} Step;

static void head_step(const Problem *p, int64_t rows, int64_t head, const Step *step, const float *query,
                      const Gathered *done) {
    float scores[FEW_ROWS * FEW_KEYS], most[FEW_ROWS], factors[FEW_ROWS];
    int64_t key_at = head * p->key_dim, value_at = p->kv_heads * p->key_dim + head * p->value_dim, at = head * rows;
    int64_t stride = round_up(p->key_dim, W);
    for (int64_t k = 0; k < step->count; k += 4) {
        for (int64_t j = k; j < min64(k + 4, step->next_count); j++) fetch(step->next[j] + key_at, p->key_dim);
        for (int64_t r = 0; r < rows; r += 3) {
            const float *q = query + r * stride;
            float *to = scores + r * FEW_KEYS + k;
            if (rows - r >= 3) dots(q, stride, 3, step->now + k, key_at, p->key_dim, to);
            else if (rows - r == 2) dots(q, stride, 2, step->now + k, key_at, p->key_dim, to);
            else dots(q, stride, 1, step->now + k, key_at, p->key_dim, to);
        }
    }
    for (int64_t r = 0; r < rows; r++) most[r] = highest(scores + r * FEW_KEYS, step->seen[r], p->softcap);
    for (int64_t r = 0; r < rows; r++)
        factors[r] = weigh(scores + r * FEW_KEYS, step->count, step->seen[r], most[r], done->maxima + at + r,
                           done->sums + at + r);
    for (int64_t j = 0; j < step->next_count; j++) fetch(step->next[j] + value_at, p->value_dim);
    for (int64_t r = 0; r < rows; r += 3) {
        float *out = done->values + (at + r) * done->stride;
        const float *weights = scores + r * FEW_KEYS, *by = factors + r;
        if (rows - r >= 3) mix_row(out, done->stride, 3, step->now, value_at, p->value_dim, step->count, weights, by);
        else if (rows - r == 2)
            mix_row(out, done->stride, 2, step->now, value_at, p->value_dim, step->count, weights, by);
        else mix_row(out, done->stride, 1, step->now, value_at, p->value_dim, step->count, weights, by);
    }
}

void attend_few(Plan *plan, const Task *task, Range keys, Gathered *done, float *scratch) {
    const Problem *p = plan->problem;
    const float *pointers[2][FEW_KEYS];
    Range seen[FEW_ROWS];
    int64_t stride = round_up(p->key_dim, W), rows = task->rows;
    float by = p->softcap > 0.0f ? p->scale : p->scale * LOG2E;
    for (int64_t row = 0; row < p->kv_heads * rows; row++)
        scaled(scratch + row * stride, query_of(plan, task, row / rows, row % rows), by, p->key_dim, stride);
    for (int64_t row = 0; row < rows; row++) seen[row] = row_range(plan, task, row);
    Step step = {.count = min64(FEW_KEYS, keys.high - keys.low)};
    pool_rows(plan, task->seq, keys.low, keys.low + step.count, pointers[0]);
    for (int64_t k = 0; k < step.count; k++) fetch(pointers[0][k], p->kv_heads * (p->key_dim + p->value_dim));
    for (int turn = 0; keys.low < keys.high; turn ^= 1) {
        int64_t after = keys.low + step.count;
        step.now = pointers[turn];
        step.next = pointers[turn ^ 1];
        step.next_count = min64(FEW_KEYS, keys.high - after);
        for (int64_t row = 0; row < rows; row++) step.seen[row] = part_of(seen[row], keys.low, step.count);
        for (int64_t k = step.count; k < round_up(step.count, 4); k++) pointers[turn][k] = pointers[turn][0];
        pool_rows(plan, task->seq, after, after + step.next_count, pointers[turn ^ 1]);
        for (int64_t head = 0; head < p->kv_heads; head++)
            head_step(p, rows, head, &step, scratch + head * rows * stride, done);
        keys.low = after;
        step.count = step.next_count;
    }
}
