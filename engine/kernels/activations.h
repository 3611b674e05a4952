/* act(x), and act(gate) * up over rows that hold gate and up side by side. `kind` counts reference.ACTIVATIONS. */
#pragma once

#include "vec.h"

/* Mirrored by native.GATED. Rows are counted in floats. */
typedef struct {
    const float *gate_up;
    float *out;
    int64_t in_row, out_row, rows, width;
    int32_t kind, threads;
} Gated;

INLINE vec silu(vec x) { return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)))); }

/* x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3) (Hendrycks and Gimpel 2016) */
INLINE vec gelu_tanh(vec x) {
    vec inner = v_mul(x, v_fma(v_set(0.044715f), v_mul(x, x), v_set(1.0f)));
    return v_div(x, v_add(v_set(1.0f), v_exp(v_mul(v_set(-1.5957691216f), inner))));
}

/* x / 2 * erfc(-x / sqrt 2), with erfc as t exp(-z^2 + p(t)), t = 1 / (1 + z / 2), of relative error 1.2e-7
   (Press et al., Numerical Recipes, 6.2: erfcc) */
INLINE vec gelu(vec x) {
    static const float terms[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                  -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    vec z = v_mul(v_abs(x), v_set(0.70710678f));
    vec t = v_div(v_set(1.0f), v_fma(v_set(0.5f), z, v_set(1.0f)));
    vec p = v_set(terms[0]);
    for (int i = 1; i < 10; i++) p = v_fma(p, t, v_set(terms[i]));
    vec tail = v_mul(t, v_exp(v_fnma(z, z, p)));
    vec half = v_mul(v_set(0.5f), x);
    return v_mul(half, v_where(v_less(x, v_zero()), tail, v_sub(v_set(2.0f), tail)));
}

INLINE vec active(vec x, int kind) {
    switch (kind) {
    case 0: return silu(x);
    case 1: return gelu_tanh(x);
    case 2: return gelu(x);
    default: return v_max(v_zero(), x);
    }
}

/* Rows [begin, end), by one thread. */
void gate_rows(const Gated *a, int64_t begin, int64_t end);
