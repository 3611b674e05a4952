/* RMS norms, of a row and of rows after a residual sum. */
#pragma once

#include "vec.h"

/* 1 / sqrt(mean of squares + eps) of n floats. */
INLINE float rms_scale(const float *x, int64_t n, float eps) {
    vec a = v_zero(), b = v_zero();
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        vec first = v_load(x + i), second = v_load(x + i + W);
        a = v_fma(first, first, a);
        b = v_fma(second, second, b);
    }
    for (; i < n; i += W) {
        vec last = v_load_at(x + i, v_first(n - i));
        a = v_fma(last, last, a);
    }
    return 1.0f / sqrtf(v_sum_of(v_add(a, b)) / (float)n + eps);
}

/* out = x * scale * (offset + weight) */
INLINE void rms_apply(float *out, const float *x, const float *weight, int64_t n, float scale, float offset) {
    vec by = v_set(scale), plus = v_set(offset);
    int64_t i = 0;
    for (; i + W <= n; i += W) v_store(out + i, v_mul(v_mul(v_load(x + i), by), v_add(v_load(weight + i), plus)));
    if (i < n) {
        lanes rest = v_first(n - i);
        vec last = v_mul(v_mul(v_load_at(x + i, rest), by), v_add(v_load_at(weight + i, rest), plus));
        v_store_at(out + i, last, rest);
    }
}

/* total = x + residual (which may be total itself), out = its RMS norm. Without a residual the norm is x's own, and
   total is not touched. */
INLINE void add_norm_row(float *total, const float *x, const float *residual, float *out, const float *weight,
                         int64_t width, float eps, float offset) {
    if (residual) {
        int64_t i = 0;
        for (; i + W <= width; i += W) v_store(total + i, v_add(v_load(residual + i), v_load(x + i)));
        if (i < width) {
            lanes rest = v_first(width - i);
            v_store_at(total + i, v_add(v_load_at(residual + i, rest), v_load_at(x + i, rest)), rest);
        }
        x = total;
    }
    rms_apply(out, x, weight, width, rms_scale(x, width, eps), offset);
}

/* Mirrored by native.ADD_NORM. Rows are counted in floats; `residual` may be null: then the norm is x's own. */
typedef struct {
    const float *x, *weight;
    float *residual, *out; /* the sum is written into `residual` */
    int64_t x_row, residual_row, out_row, rows, width;
    float eps, offset;
    int32_t threads;
} AddNorm;

/* Rows [begin, end), by one thread. */
void add_norm_rows(const AddNorm *a, int64_t begin, int64_t end);
