/* Residual sum and RMS norm in one go. */
#include "norms.h"
#include "rows.h"

/* Mirrored by native.ADD_NORM. Rows are counted in floats; `residual` may be null: then the norm is x's own. */
typedef struct {
    const float *x, *weight;
    float *residual, *out;
    int64_t x_row, residual_row, out_row, rows, width;
    float eps, offset;
    int32_t threads;
} AddNorm;

INLINE void add_row(float *total, const float *x, int64_t width) {
    int64_t i = 0;
    for (; i + W <= width; i += W) v_store(total + i, v_add(v_load(total + i), v_load(x + i)));
    if (i < width) {
        lanes rest = v_first(width - i);
        v_store_at(total + i, v_add(v_load_at(total + i, rest), v_load_at(x + i, rest)), rest);
    }
}

static void add_norm_rows(const void *arguments, int64_t begin, int64_t end) {
    const AddNorm *a = arguments;
    for (int64_t row = begin; row < end; row++) {
        const float *total = a->x + row * a->x_row;
        if (a->residual) {
            float *sum = a->residual + row * a->residual_row;
            add_row(sum, total, a->width);
            total = sum;
        }
        float scale = rms_scale(total, a->width, a->eps);
        rms_apply(a->out + row * a->out_row, total, a->weight, a->width, scale, a->offset);
    }
}

EXPORT void add_rms_norm(const AddNorm *a) { over_rows(add_norm_rows, a, a->rows, 2 * a->width, a->threads); }
