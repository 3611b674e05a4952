/* The largest of a row, and what else its first pass tells. */
#pragma once

#include "vec.h"

typedef struct {
    float best, second;
    int64_t index;
} ChoosePeak;

INLINE uint32_t choose_bits(lanes m) {
#ifdef __AVX512F__
    return m;
#else
    return (uint32_t)_mm256_movemask_ps(m);
#endif
}

INLINE lanes choose_nan(vec x) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
#else
    return _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
#endif
}

/* First place of the largest number, the best two numbers; the first NaN where there is one. */
static inline ChoosePeak choose_peak(const float *x, int64_t width) {
    enum { CHUNK = 1024 };
    ChoosePeak peak = {-INFINITY, -INFINITY, 0};
    int64_t chunk = 0;
    for (int64_t start = 0; start < width; start += CHUNK) {
        int64_t size = width - start < CHUNK ? width - start : CHUNK;
        vec low = v_set(-INFINITY), a = low, b = low, c = low, d = low;
        uint32_t odd = 0;
        int64_t i = 0;
        for (; i + 2 * W <= size; i += 2 * W) {
            vec p = v_load(x + start + i), q = v_load(x + start + i + W);
            odd |= choose_bits(choose_nan(p)) | choose_bits(choose_nan(q));
            b = v_max(b, v_min(a, p));
            a = v_max(a, p);
            d = v_max(d, v_min(c, q));
            c = v_max(c, q);
        }
        for (; i < size; i += W) {
            lanes m = v_first(size - i);
            vec p = v_where(m, v_load_at(x + start + i, m), low);
            odd |= choose_bits(choose_nan(p));
            b = v_max(b, v_min(a, p));
            a = v_max(a, p);
        }
        if (odd) {
            for (i = start; x[i] == x[i];) i++;
            return (ChoosePeak){x[i], x[i], i};
        }
        float best = v_max_of(v_max(a, c));
        vec next = v_max(v_max(b, d), v_min(a, c));
        a = v_max(a, c);
        /* The second of the chunk: the largest of the lanes' seconds, and of the lanes' firsts but one. */
        float firsts[W];
        v_store(firsts, a);
        float second = v_max_of(next);
        int seen = 0;
        for (int lane = 0; lane < W; lane++) {
            if (!seen && firsts[lane] == best)
                seen = 1;
            else if (firsts[lane] > second)
                second = firsts[lane];
        }
        if (best > peak.best) {
            peak.second = peak.best > second ? peak.best : second;
            peak.best = best;
            chunk = start;
        } else if (best > peak.second) {
            peak.second = best;
        }
    }
    while (x[chunk] != peak.best) chunk++;
    peak.index = chunk;
    return peak;
}
