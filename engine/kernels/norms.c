/* Residual sum and RMS norm in one go. */
#include "norms.h"
#include "rows.h"

void add_norm_rows(const AddNorm *a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        float *residual = a->residual ? a->residual + row * a->residual_row : 0;
        add_norm_row(residual, a->x + row * a->x_row, residual, a->out + row * a->out_row, a->weight, a->width, a->eps,
                     a->offset);
    }
}

static void add_norm_part(const void *arguments, int64_t begin, int64_t end) { add_norm_rows(arguments, begin, end); }

EXPORT void add_rms_norm(const AddNorm *a) { over_rows(add_norm_part, a, a->rows, 2 * a->width, a->threads); }
