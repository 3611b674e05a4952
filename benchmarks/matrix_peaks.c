/* What one core can do at best, in the vectors that the matrix kernels use: multiply-adds in registers, and reading. */
#include "gemm_vectors.h"

#define SUMS 12 /* enough chains to hide the latency */
#define KEEP(x) __asm__ volatile("" : "+x"(x))

/* turns * 12 * W multiply-adds of floats; the result is of no meaning. */
EXPORT float peak_floats(int64_t turns) {
    vec sums[SUMS], a = v_set(0.999f), b = v_set(1e-3f), total = v_zero();
    for (int i = 0; i < SUMS; i++) sums[i] = v_set((float)i);
    for (int64_t turn = 0; turn < turns; turn++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) sums[i] = v_fma(sums[i], a, b);
    }
    for (int i = 0; i < SUMS; i++) total = v_add(total, sums[i]);
    return v_sum_of(total);
}

/* turns * 12 * W * 4 multiply-adds of bytes, in the way of int8 matrices: with halves of 16 bits that are two of each. */
EXPORT int32_t peak_bytes(int64_t turns) {
    int8_t quad[4] = {1, 2, 3, 4};
    ivec sums[SUMS], codes = i_set(0x01020304), total = i_set(0);
    for (int i = 0; i < SUMS; i++) sums[i] = i_set(i);
    for (int64_t turn = 0; turn < turns * (1 + WIDE_QUADS); turn++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) {
            KEEP(codes);
#if WIDE_QUADS
            sums[i] = i_add(sums[i], i_multiply_pairs(codes, i_set(four_bytes(quad))));
#else
            sums[i] = i_dot_bytes(sums[i], codes, quad);
#endif
        }
    }
    for (int i = 0; i < SUMS; i++) total = i_add(total, sums[i]);
    return i_sum_of(total);
}

/* Reads whole lines, and fetches them a page ahead, which the hardware alone does not. */
EXPORT int32_t peak_read(const uint8_t *from, int64_t bytes) {
    ivec sums[4] = {i_set(0), i_set(0), i_set(0), i_set(0)};
    for (int64_t at = 0; at + 16 * W <= bytes; at += 16 * W) {
        for (int64_t line = 0; line < 16 * W; line += 64) _mm_prefetch((const char *)from + at + 4096 + line, _MM_HINT_T1);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sums[i] = i_add(sums[i], i_load(from + at + i * 4 * W));
    }
    return i_sum_of(i_add(i_add(sums[0], sums[1]), i_add(sums[2], sums[3])));
}
