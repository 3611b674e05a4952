/* Gated activations of rows. */
#include "activations.h"
#include "rows.h"

INLINE void gate_row(const float *gate, const float *up, float *out, int64_t width, int kind) {
    int64_t i = 0;
    for (; i + W <= width; i += W) v_store(out + i, v_mul(active(v_load(gate + i), kind), v_load(up + i)));
    if (i < width) {
        lanes rest = v_first(width - i);
        v_store_at(out + i, v_mul(active(v_load_at(gate + i, rest), kind), v_load_at(up + i, rest)), rest);
    }
}

void gate_rows(const Gated *a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float *gate = a->gate_up + row * a->in_row;
        float *out = a->out + row * a->out_row;
        switch (a->kind) { /* constants, so that the loops are made once for each kind */
        case 0: gate_row(gate, gate + a->width, out, a->width, 0); break;
        case 1: gate_row(gate, gate + a->width, out, a->width, 1); break;
        case 2: gate_row(gate, gate + a->width, out, a->width, 2); break;
        default: gate_row(gate, gate + a->width, out, a->width, 3);
        }
    }
}

static void gate_part(const void *arguments, int64_t begin, int64_t end) { gate_rows(arguments, begin, end); }

EXPORT void gated_activation(const Gated *a) { over_rows(gate_part, a, a->rows, 2 * a->width, a->threads); }
