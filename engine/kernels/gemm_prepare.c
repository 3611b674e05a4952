/* Rows of activations rounded to int8, one scale per group: scale = max |x| / 127, codes to nearest, ties to even. */
#include <math.h>
#include <string.h>

#include "gemm_tiles.h"

#define SMALLEST 1e-30f /* reference_matrix.SMALLEST: groups below it count as zeros, so that 127 / max is finite */
#define INFINITE 0x7f800000 /* the bits of an infinity; a NaN's are larger, as those of |x| are ordered like |x| */

INLINE vec prepare_load(const float *x, int64_t i, int64_t count) {
    return i + W <= count ? v_load(x + i) : i < count ? v_load_at(x + i, v_first(count - i)) : v_zero();
}

/* `count` floats (zeros behind them) to a whole group at `to`; `wide`: as int16 for `i_dot_bytes`. */
INLINE void prepare_group(const float *x, int64_t count, int8_t *to, const int format) {
    const int wide = WIDE_QUADS && format == GEMM_INT8, bytes = GROUP * (wide ? 2 : 1);
    ivec top = i_set(0), total = i_set(0);
    UNROLL for (int i = 0; i < GROUP; i += W) top = i_max(top, i_bits_of(v_abs(prepare_load(x, i, count))));
    int32_t bits = i_max_of(top);
    float largest = one_float(&bits), scale = largest / 127.0f;
    if (bits >= INFINITE || largest < SMALLEST) {
        scale = bits >= INFINITE ? NAN : 0.0f; /* the sums of this row become NaN; other rows never see it */
        memset(to, 0, (size_t)bytes);
    } else {
        vec inverse = v_set(127.0f / largest);
        UNROLL for (int i = 0; i < GROUP; i += W) {
            ivec codes = v_nearest(v_mul(prepare_load(x, i, count), inverse));
            total = i_add(total, codes);
            if (wide) i_store_pairs(to + 2 * i, codes);
            else i_store_bytes(to + i, codes);
        }
    }
    int32_t sum = i_sum_of(total), start = -128 * sum;
    float offset = scale * (float)sum;
    memcpy(to + bytes, &scale, 4);
    memcpy(to + bytes + 4, format == GEMM_INT8 ? (const void *)&start : &offset, 4);
}

INLINE void prepare_row(const float *x, int64_t inputs, int8_t *to, const int format) {
    const int bytes = GROUP * (WIDE_QUADS && format == GEMM_INT8 ? 2 : 1) + GROUP_EXTRA;
    int64_t i = 0;
    for (; i + GROUP <= inputs; i += GROUP, to += bytes) prepare_group(x + i, GROUP, to, format);
    if (i < inputs) prepare_group(x + i, inputs - i, to, format);
}

void gemm_prepare(const Matrix *m, const float *x, int64_t x_row, int64_t begin, int64_t end, void *space) {
    if (m->format == GEMM_FP16) return;
    for (int64_t row = begin; row < end; row++) {
        const float *from = x + row * x_row;
        int8_t *to = (int8_t *)space + row * gemm_row_bytes(m);
        if (m->format == GEMM_INT4) prepare_row(from, m->inputs, to, GEMM_INT4);
        else prepare_row(from, m->inputs, to, GEMM_INT8);
    }
}
