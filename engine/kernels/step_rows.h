/* Operations on rows between the matrix products of a step. */
#pragma once

#include "activations.h"
#include "norms.h"
#include "step.h"

INLINE void step_layer_norm(float *out, const float *x, const StepNorm *norm, int64_t width) {
    vec sum = v_zero(), squares = v_zero();
    for (int64_t i = 0; i < width; i += W) sum = v_add(sum, v_load_at(x + i, v_first(width - i)));
    float mean = v_sum_of(sum) / (float)width;
    for (int64_t i = 0; i < width; i += W) {
        lanes m = v_first(width - i);
        vec apart = v_where(m, v_sub(v_load_at(x + i, m), v_set(mean)), v_zero());
        squares = v_fma(apart, apart, squares);
    }
    vec by = v_set(1.0f / sqrtf(v_sum_of(squares) / (float)width + norm->eps));
    for (int64_t i = 0; i < width; i += W) {
        lanes m = v_first(width - i);
        vec y = v_mul(v_sub(v_load_at(x + i, m), v_set(mean)), by);
        if (norm->weight) y = v_mul(y, v_load_at(norm->weight + i, m));
        if (norm->bias) y = v_add(y, v_load_at(norm->bias + i, m));
        v_store_at(out + i, y, m);
    }
}

/* out may be x */
INLINE void step_norm(float *out, const float *x, const StepNorm *norm, int64_t width) {
    if (norm->kind == STEP_RMS)
        rms_apply(out, x, norm->weight, width, rms_scale(x, width, norm->eps), norm->offset);
    else
        step_layer_norm(out, x, norm, width);
}

/* out = a + by * b */
INLINE void step_add(float *out, const float *a, const float *b, float by, int64_t width) {
    vec times = v_set(by);
    int64_t i = 0;
    for (; i + W <= width; i += W) v_store(out + i, v_fma(times, v_load(b + i), v_load(a + i)));
    if (i < width) {
        lanes m = v_first(width - i);
        v_store_at(out + i, v_fma(times, v_load_at(b + i, m), v_load_at(a + i, m)), m);
    }
}

/* out = act(gate) * up, or act(gate) where `up` is null */
INLINE void step_activate(float *out, const float *gate, const float *up, int64_t width, int kind) {
    for (int64_t i = 0; i < width; i += W) {
        lanes m = v_first(width - i);
        vec y = active(v_load_at(gate + i, m), kind);
        v_store_at(out + i, up ? v_mul(y, v_load_at(up + i, m)) : y, m);
    }
}

/* A row of a packed matrix, as floats. */
INLINE void step_unpack(float *out, const Matrix *m, int64_t id) {
    int64_t panel = id / 32, lane = id % 32, inputs = m->inputs;
    if (m->format == GEMM_FP16) {
        const uint16_t *codes = (const uint16_t *)m->codes + panel * inputs * 32 + lane;
        for (int64_t i = 0; i < inputs; i++) out[i] = _cvtsh_ss(codes[i * 32]);
        return;
    }
    int64_t group = m->group, groups = (inputs + group - 1) / group;
    for (int64_t i = 0; i < inputs; i++) {
        int64_t at = panel * groups + i / group, quad = i % group / 4;
        float scale = _cvtsh_ss(((const uint16_t *)m->scales)[at * 32 + lane]);
        if (m->format == GEMM_INT8) {
            const uint8_t *codes = (const uint8_t *)m->codes + at * group * 32;
            out[i] = m->multiplier * scale * (codes[quad * 128 + lane * 4 + i % 4] - 128);
        } else {
            const uint8_t *codes = (const uint8_t *)m->codes + at * group * 16;
            int code = codes[quad / 2 * 128 + lane * 4 + i % 4] >> (quad % 2 * 4) & 15;
            float minimum = _cvtsh_ss(((const uint16_t *)m->minima)[at * 32 + lane]);
            out[i] = m->multiplier * scale * code + m->multiplier * minimum;
        }
    }
}

/* A row of the embedding table, as floats, times a number. */
INLINE void step_embed(float *out, const StepProgram *program, int64_t id) {
    int64_t width = program->width, at = id * width, i = 0;
    float scale = program->embedding_scale;
    if (program->embedding_type == STEP_PACKED) {
        step_unpack(out, program->embedding, id);
        for (; i < width; i++) out[i] *= scale;
    } else if (program->embedding_type == STEP_FP32) {
        const float *row = (const float *)program->embedding + at;
        for (; i < width; i++) out[i] = row[i] * scale;
    } else if (program->embedding_type == STEP_FP16) {
        const uint16_t *row = (const uint16_t *)program->embedding + at;
        for (; i + 8 <= width; i += 8)
            _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + i))),
                                                    _mm256_set1_ps(scale)));
        for (; i < width; i++) out[i] = _cvtsh_ss(row[i]) * scale;
    } else {
        const uint16_t *row = (const uint16_t *)program->embedding + at;
        for (; i < width; i++) {
            uint32_t bits = (uint32_t)row[i] << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            out[i] = value * scale;
        }
    }
}
