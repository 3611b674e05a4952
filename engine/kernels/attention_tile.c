/* Many query rows (prefill, verification): bound by arithmetic. Keys and values of a step are packed once for all rows
   of the tile, and both products run in one register-blocked kernel (Goto and van de Geijn 2008). */
#include <string.h>

#include "attention.h"

/* MR and NR: rows and columns of the block of sums that is kept in registers. */

/* sums[MR][NR] = a [MR][depth] b [depth][NR], plus the old sums times their row's factor if there are factors. */
INLINE void multiply_block(const float *a, int64_t a_row, const float *b, int64_t depth, float *sums, int64_t sums_row,
                     const float *factors) {
    vec c[MR][2];
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++) {
        c[r][0] = factors ? v_mul(v_load(sums + r * sums_row), v_set(factors[r])) : v_zero();
        c[r][1] = factors ? v_mul(v_load(sums + r * sums_row + W), v_set(factors[r])) : v_zero();
    }
    for (int64_t k = 0; k < depth; k++) {
        vec left = v_load(b + k * NR), right = v_load(b + k * NR + W);
#pragma GCC unroll 6
        for (int r = 0; r < MR; r++) {
            vec x = v_set(a[r * a_row + k]);
            c[r][0] = v_fma(x, left, c[r][0]);
            c[r][1] = v_fma(x, right, c[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++) {
        v_store(sums + r * sums_row, c[r][0]);
        v_store(sums + r * sums_row + W, c[r][1]);
    }
}

INLINE void transpose8(const char *const *from, int64_t offset, const int half, float *to) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++)
        r[i] = half ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from[i] + 2 * offset)))
                    : _mm256_loadu_ps((const float *)from[i] + offset);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * NR, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * NR, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

INLINE float element(const char *row, int64_t i, const int half) {
    return half ? _cvtsh_ss(((const uint16_t *)row)[i]) : ((const float *)row)[i];
}

/* [keys][width] -> [panel][width][NR]; `rows` is filled up to TILE_KEYS. */
INLINE void pack_keys(const char *const *rows, int64_t offset, int64_t width, int64_t count, float *to, const int half) {
    for (int64_t panel = 0; panel < count; panel += NR, to += width * NR)
        for (int64_t k = 0; k < NR; k += 8) {
            int64_t i = 0;
            for (; i + 8 <= width; i += 8) transpose8(rows + panel + k, offset + i, half, to + i * NR + k);
            for (; i < width; i++)
                for (int64_t j = 0; j < 8; j++) to[i * NR + k + j] = element(rows[panel + k + j], offset + i, half);
        }
}

/* [keys][width] -> [panel][TILE_KEYS][NR], columns past the width 0 */
INLINE void pack_values(const char *const *rows, int64_t offset, int64_t width, int64_t count, float *to,
                        const int half) {
    for (int64_t panel = 0; panel < width; panel += NR, to += TILE_KEYS * NR)
        for (int64_t k = 0; k < count; k++)
            for (int64_t i = 0; i < NR; i += W) {
                int64_t at = offset + panel + i, left = width - panel - i;
                vec x = left >= W ? load_entry(rows[k], at, half)
                        : left > 0 ? load_first(rows[k], at, left, half) : v_zero();
                v_store(to + k * NR + i, x);
            }
}

static void pack_step(const Problem *p, const char *const *rows, int64_t head, int64_t count, float *keys,
                      float *values) {
    int64_t key_at = head * p->key_dim, value_at = p->kv_heads * p->key_dim + head * p->value_dim;
    if (p->pool_type) {
        pack_keys(rows, key_at, p->key_dim, count, keys, 1);
        pack_values(rows, value_at, p->value_dim, count, values, 1);
    } else {
        pack_keys(rows, key_at, p->key_dim, count, keys, 0);
        pack_values(rows, value_at, p->value_dim, count, values, 0);
    }
}

typedef struct {
    float *query, *keys, *values, *scores; /* [rows][key_dim], packed, packed, [MR][TILE_KEYS] */
    Range seen[TILE_ROWS];                 /* what each row sees */
    int64_t token[TILE_ROWS];
} Packed;

/* One step of keys for the MR rows from `row` on. */
static void step_of_block(const Problem *p, int64_t seq, const Packed *packed, int64_t row, int64_t first,
                          int64_t count, const Gathered *done) {
    const Range *seen = packed->seen + row;
    Range all = seen[0];
    for (int r = 1; r < MR; r++) all = (Range){min64(all.low, seen[r].low), max64(all.high, seen[r].high)};
    all = part_of(all, first, count);
    int64_t low = all.low / NR * NR;
    if (low >= all.high) return;
    float *scores = packed->scores, most[MR], factors[MR];
    Range own[MR];
    for (int64_t k = low; k < all.high; k += NR)
        multiply_block(packed->query + row * p->key_dim, p->key_dim, packed->keys + k * p->key_dim, p->key_dim,
                       scores + k, TILE_KEYS, 0);
    for (int r = 0; r < MR; r++) {
        float *from = scores + r * TILE_KEYS + low;
        own[r] = part_of(seen[r], first + low, all.high - low);
        cap(from, own[r], p->softcap);
        hide(p, seq, packed->token[row + r], first + low, own[r], from, -INFINITY);
        most[r] = highest(from, own[r]);
    }
    for (int r = 0; r < MR; r++) {
        float *from = scores + r * TILE_KEYS + low;
        factors[r] = weigh(from, all.high - low, own[r], most[r], done->maxima + row + r, done->sums + row + r);
        hide(p, seq, packed->token[row + r], first + low, own[r], from, 0.0f);
    }
    float *out = done->values + row * done->stride;
    for (int64_t column = 0; column < done->stride; column += NR)
        multiply_block(scores + low, TILE_KEYS, packed->values + column * TILE_KEYS + low * NR, all.high - low,
                       out + column, done->stride, factors);
}

void attend_tile(const Layer *layer, const Task *task, Range keys, Gathered *done, float *scratch) {
    const Problem *p = layer->problem;
    const char *rows[TILE_KEYS];
    int64_t padded = round_up(task->rows, MR);
    float by = p->softcap > 0.0f ? p->scale : p->scale * LOG2E;
    Packed packed = {.keys = scratch, .values = scratch + TILE_KEYS * p->key_dim};
    packed.scores = packed.values + TILE_KEYS * done->stride;
    packed.query = packed.scores + MR * TILE_KEYS;
    for (int64_t row = 0; row < padded; row++) {
        int64_t real = min64(row, task->rows - 1);
        scaled(packed.query + row * p->key_dim, query_of(layer, task, task->head, real), by, p->key_dim, 0);
        packed.seen[row] = row_range(layer, task, real);
        packed.token[row] = token_of(layer, task, real);
    }
    for (int64_t first = keys.low; first < keys.high; first += TILE_KEYS) {
        int64_t count = min64(TILE_KEYS, keys.high - first);
        pool_rows(layer, task->seq, first, first + count, rows);
        for (int64_t k = count; k < TILE_KEYS; k++) rows[k] = rows[0];
        pack_step(p, rows, task->head, count, packed.keys, packed.values);
        for (int64_t row = 0; row < padded; row += MR) step_of_block(p, task->seq, &packed, row, first, count, done);
    }
}
