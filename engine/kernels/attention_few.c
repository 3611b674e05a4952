/* Few query rows (decode): bound by memory. Keys are taken as dot products straight from the pool, all heads of a slot
   one after another, so that a slot's row streams in once and in order. */
#include "attention.h"

#ifdef __AVX512F__
#define TOGETHER 4 /* rows whose sums fit into the registers, with 4 keys or 4 vectors of values */
#else
#define TOGETHER 3
#endif

/* Ask for a part of a row of the next step while one of this step's is worked on; a few at a time, as no more than the
   CPU can wait for are heard. */
INLINE void fetch(const char *row, int64_t offset, int64_t width, const int half) {
    const int64_t size = half ? 2 : 4;
    for (int64_t i = 0; i < width * size; i += 64) _mm_prefetch(row + offset * size + i, _MM_HINT_T1);
}

/* Scores of `rows` query rows [stride] with 4 keys; the keys' tail lanes are not read. */
INLINE void dots(const float *query, int64_t stride, const int rows, const char *const *keys, int64_t offset,
                 int64_t width, const int half, float *scores) {
    vec sums[TOGETHER][4], key[4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) sums[r][k] = v_zero();
    for (int64_t i = 0; i < width; i += W) {
        for (int k = 0; k < 4; k++)
            key[k] = width - i >= W ? load_entry(keys[k], offset + i, half)
                                    : load_first(keys[k], offset + i, width - i, half);
        for (int r = 0; r < rows; r++) {
            vec q = v_load(query + r * stride + i);
            for (int k = 0; k < 4; k++) sums[r][k] = v_fma(q, key[k], sums[r][k]);
        }
    }
    vec folded[TOGETHER];
    for (int r = 0; r < rows; r++) folded[r] = v_fold(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    for (int r = 0; r + 1 < rows; r += 2) v_store_folded(scores + r * FEW_KEYS, FEW_KEYS, folded[r], folded[r + 1]);
    if (rows % 2) v_store_folded(scores + (rows - 1) * FEW_KEYS, 0, folded[rows - 1], folded[rows - 1]);
}

/* One step of keys, FEW_KEYS at most, and what the next one will read. */
typedef struct {
    const char *const *rows, *const *next; /* of the pool */
    int64_t first, count, next_count;
    Range seen[FEW_ROWS]; /* what each query row sees of it */
} KeyStep;

/* Some rows of one head. */
typedef struct {
    int64_t key_at, key_dim, value_at, value_dim; /* where its keys and values lie in a pool row */
    const float *query;                           /* [rows][query_stride] */
    float *scores, *factors, *out;                /* [rows][FEW_KEYS], [rows], [rows][out_stride] */
    int64_t query_stride, out_stride;
} HeadRows;

/* out[r][c] = out * factor + sum over keys of weight * value, for n vectors from column i on; of the last vector `last`
   lanes exist. */
INLINE void mix(const KeyStep *step, const HeadRows *head, int64_t i, const int rows, const int n, const int64_t last,
                const int half, const int ahead) {
    vec sums[TOGETHER][4];
    float *out = head->out + i;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++)
            sums[r][c] = v_mul(v_load(out + r * head->out_stride + c * W), v_set(head->factors[r]));
    for (int64_t k = 0; k < step->count; k++) {
        if (ahead && k < step->next_count) fetch(step->next[k], head->value_at, head->value_dim, half);
        vec weight[TOGETHER]; /* these, one value and all sums just fit the 16 registers of AVX2 */
        for (int r = 0; r < rows; r++) weight[r] = v_set(head->scores[r * FEW_KEYS + k]);
        for (int c = 0; c < n; c++) {
            int64_t at = head->value_at + i + c * W;
            vec value = last < W ? load_first(step->rows[k], at, last, half) : load_entry(step->rows[k], at, half);
            for (int r = 0; r < rows; r++) sums[r][c] = v_fma(weight[r], value, sums[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) v_store(out + r * head->out_stride + c * W, sums[r][c]);
}

/* With a step's keys; `ahead`: ask for the next step's. */
INLINE void all_dots(const KeyStep *step, const HeadRows *head, const int rows, const int half, const int ahead) {
    for (int64_t k = 0; k < step->count; k += 4) {
        for (int64_t j = k; ahead && j < min64(k + 4, step->next_count); j++)
            fetch(step->next[j], head->key_at, head->key_dim, half);
        dots(head->query, head->query_stride, rows, step->rows + k, head->key_at, head->key_dim, half,
             head->scores + k);
    }
}

/* With a step's values: whole vectors in panels of 4, then the rest. */
INLINE void all_mixed(const KeyStep *step, const HeadRows *head, const int rows, const int half, const int ahead) {
    int64_t i = 0, width = head->value_dim;
    for (; i + 4 * W <= width; i += 4 * W) mix(step, head, i, rows, 4, W, half, ahead && i == 0);
    for (; i + 2 * W <= width; i += 2 * W) mix(step, head, i, rows, 2, W, half, ahead && i == 0);
    for (; i + W <= width; i += W) mix(step, head, i, rows, 1, W, half, ahead && i == 0);
    if (i < width) mix(step, head, i, rows, 1, width - i, half, ahead && i == 0);
}

/* Weights of one head's rows: from scores to numbers that sum up to done->sums. */
static void weigh_rows(const Layer *layer, const Task *task, const KeyStep *step, float *scores, float *maxima,
                       float *sums, float *factors) {
    const Problem *p = layer->problem;
    float most[FEW_ROWS];
    for (int64_t r = 0; r < task->rows; r++) {
        float *own = scores + r * FEW_KEYS;
        cap(own, step->seen[r], p->softcap);
        hide(p, task->seq, token_of(layer, task, r), step->first, step->seen[r], own, -INFINITY);
        most[r] = highest(own, step->seen[r]);
    }
    for (int64_t r = 0; r < task->rows; r++) {
        float *own = scores + r * FEW_KEYS;
        factors[r] = weigh(own, step->count, step->seen[r], most[r], maxima + r, sums + r);
        hide(p, task->seq, token_of(layer, task, r), step->first, step->seen[r], own, 0.0f);
    }
}

/* One of the two products for so many rows: constants, so that the sums stay in registers. */
#if TOGETHER == 4
#define FOR_FOUR(product, step, head, half, ahead) case 4: product(step, head, 4, half, ahead); break;
#else
#define FOR_FOUR(product, step, head, half, ahead)
#endif
#define FOR_ROWS(rows, product, step, head, half, ahead) \
    switch (rows) { \
        FOR_FOUR(product, step, head, half, ahead) \
    case 3: product(step, head, 3, half, ahead); break; \
    case 2: product(step, head, 2, half, ahead); break; \
    default: product(step, head, 1, half, ahead); \
    }

INLINE void step_of_head(const Layer *layer, const Task *task, const KeyStep *step, HeadRows head, float *maxima,
                         float *sums, const int half) {
    float scores[FEW_ROWS * FEW_KEYS], factors[FEW_ROWS];
    const float *query = head.query;
    float *out = head.out;
    int64_t rows = task->rows;
    for (int64_t r = 0; r < rows; r += TOGETHER) {
        head.query = query + r * head.query_stride;
        head.scores = scores + r * FEW_KEYS;
        FOR_ROWS(min64(rows - r, TOGETHER), all_dots, step, &head, half, r == 0)
    }
    weigh_rows(layer, task, step, scores, maxima, sums, factors);
    for (int64_t r = 0; r < rows; r += TOGETHER) {
        head.scores = scores + r * FEW_KEYS;
        head.factors = factors + r;
        head.out = out + r * head.out_stride;
        FOR_ROWS(min64(rows - r, TOGETHER), all_mixed, step, &head, half, r == 0)
    }
}

INLINE void few_keys(const Layer *layer, const Task *task, Range keys, Gathered *done, float *query, const int half) {
    const Problem *p = layer->problem;
    const char *pointers[2][FEW_KEYS];
    Range seen[FEW_ROWS];
    KeyStep step = {.count = min64(FEW_KEYS, keys.high - keys.low)};
    int64_t rows = task->rows, stride = round_up(p->key_dim, W), first = max64(task->head, 0);
    int64_t heads = task->head < 0 ? p->kv_heads : 1;
    for (int64_t row = 0; row < rows; row++) seen[row] = row_range(layer, task, row);
    pool_rows(layer, task->seq, keys.low, keys.low + step.count, pointers[0]);
    int64_t width = p->kv_heads * (p->key_dim + p->value_dim);
    for (int64_t k = 0; task->head < 0 && k < step.count; k++) fetch(pointers[0][k], 0, width, half);
    for (int turn = 0; keys.low < keys.high; turn ^= 1) {
        step.rows = pointers[turn];
        step.next = pointers[turn ^ 1];
        step.first = keys.low;
        keys.low += step.count;
        step.next_count = min64(FEW_KEYS, keys.high - keys.low);
        for (int64_t k = step.count; k < round_up(step.count, 4); k++) pointers[turn][k] = pointers[turn][0];
        pool_rows(layer, task->seq, keys.low, keys.low + step.next_count, pointers[turn ^ 1]);
        for (int64_t row = 0; row < rows; row++) step.seen[row] = part_of(seen[row], step.first, step.count);
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = head * rows, value_at = p->kv_heads * p->key_dim + (first + head) * p->value_dim;
            HeadRows own = {(first + head) * p->key_dim, p->key_dim, value_at, p->value_dim, query + at * stride};
            own.out = done->values + at * done->stride;
            own.query_stride = stride;
            own.out_stride = done->stride;
            step_of_head(layer, task, &step, own, done->maxima + at, done->sums + at, half);
        }
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
