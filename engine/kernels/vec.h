/* Vectors of W floats: AVX-512 where the compiler is told so, AVX2 otherwise. Names: v_ for a vector's operations. */
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

#ifdef __AVX512F__
#define W 16
typedef __m512 vec;
typedef __mmask16 lanes;

INLINE vec v_set(float x) { return _mm512_set1_ps(x); }
INLINE vec v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE lanes v_first(int64_t n) { return (lanes)(n >= W ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u); }
/* Lanes outside the mask are not read, and are 0. */
INLINE vec v_load_at(const float *p, lanes m) { return _mm512_maskz_loadu_ps(m, p); }
INLINE void v_store_at(float *p, vec x, lanes m) { _mm512_mask_storeu_ps(p, m, x); }
/* Of 16-bit floats. */
INLINE vec v_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec v_load_half_first(const uint16_t *p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_first(n), p));
}
INLINE void v_store_half(uint16_t *p, vec x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void v_store_half_first(uint16_t *p, vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, v_first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE lanes v_lanes(uint32_t bits) { return (lanes)bits; }
INLINE vec v_where(lanes m, vec x, vec otherwise) { return _mm512_mask_blend_ps(m, otherwise, x); }
INLINE lanes v_between(int64_t low, int64_t high) { return (lanes)(v_first(high) & ~v_first(low)); }
INLINE lanes v_less(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec v_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
/* Of a number and a NaN, the second argument: v_max(bound, x) keeps a NaN of x. */
INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec v_abs(vec a) { return _mm512_abs_ps(a); }
INLINE vec v_with_sign_of(vec a, vec sign) {
    __m512i bit = _mm512_set1_epi32((int)0x80000000);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_and_si512(_mm512_castps_si512(sign), bit)));
}
INLINE vec v_round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_scale2(vec p, vec whole) { return _mm512_scalef_ps(p, whole); } /* p * 2^whole */
INLINE vec v_swap_pairs(vec a) { return _mm512_permute_ps(a, 0xb1); }
INLINE vec v_fma_addsub(vec a, vec b, vec c) { return _mm512_fmaddsub_ps(a, b, c); } /* a b - c, a b + c, ... */
INLINE __m256 v_halves(vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
}
INLINE float v_max_of(vec a) { return _mm512_reduce_max_ps(a); }
INLINE float v_lowest(vec a) { return _mm512_cvtss_f32(a); }
/* The sums of four vectors, spread over the 128-bit lanes: lanes of the result add up to (a, b, c, d). */
INLINE vec v_fold(vec a, vec b, vec c, vec d) {
    vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d left = _mm512_castps_pd(ab), right = _mm512_castps_pd(cd);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
}
/* Four sums each of two folded vectors, to p and p + stride. */
INLINE void v_store_folded(float *p, int64_t stride, vec a, vec b) {
    vec ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 x = _mm512_add_ps(ab, _mm512_shuffle_f32x4(ab, ab, 0xb1));
    _mm_storeu_ps(p, _mm512_castps512_ps128(x));
    _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(x, 2));
}
#else
#define W 8
typedef __m256 vec;
typedef __m256 lanes; /* all bits of a lane set, or none */

INLINE vec v_set(float x) { return _mm256_set1_ps(x); }
INLINE vec v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE lanes v_first(int64_t n) {
    const __m256i counting = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int bounded = n > W ? W : n < 0 ? 0 : (int)n;
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(bounded), counting));
}
INLINE vec v_load_at(const float *p, lanes m) { return _mm256_maskload_ps(p, _mm256_castps_si256(m)); }
INLINE void v_store_at(float *p, vec x, lanes m) { _mm256_maskstore_ps(p, _mm256_castps_si256(m), x); }
INLINE vec v_load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec v_load_half_first(const uint16_t *p, int64_t n) {
    uint16_t first[W] = {0};
    memcpy(first, p, 2 * (size_t)(n > W ? W : n));
    return v_load_half(first);
}
INLINE void v_store_half(uint16_t *p, vec x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void v_store_half_first(uint16_t *p, vec x, int64_t n) {
    uint16_t all[W];
    v_store_half(all, x);
    memcpy(p, all, 2 * (size_t)(n > W ? W : n));
}
INLINE lanes v_lanes(uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each));
}
INLINE vec v_where(lanes m, vec x, vec otherwise) { return _mm256_blendv_ps(otherwise, x, m); }
INLINE lanes v_between(int64_t low, int64_t high) { return _mm256_andnot_ps(v_first(low), v_first(high)); }
INLINE lanes v_less(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec v_fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec v_abs(vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vec v_with_sign_of(vec a, vec sign) { return _mm256_or_ps(a, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }
INLINE vec v_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec v_scale2(vec p, vec whole) {
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
INLINE vec v_swap_pairs(vec a) { return _mm256_permute_ps(a, 0xb1); }
INLINE vec v_fma_addsub(vec a, vec b, vec c) { return _mm256_fmaddsub_ps(a, b, c); }
INLINE __m256 v_halves(vec a) { return a; }
INLINE float v_lowest(vec a) { return _mm256_cvtss_f32(a); }
INLINE vec v_fold(vec a, vec b, vec c, vec d) {
    vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256d left = _mm256_castps_pd(ab), right = _mm256_castps_pd(cd);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(left, right)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(left, right)));
}
INLINE void v_store_folded(float *p, int64_t stride, vec a, vec b) {
    vec x = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    _mm_storeu_ps(p, _mm256_castps256_ps128(x));
    _mm_storeu_ps(p + stride, _mm256_extractf128_ps(x, 1));
}
INLINE float v_max_of(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#endif

INLINE vec v_zero(void) { return v_set(0.0f); }

INLINE float v_sum_of(vec a) {
    __m256 half = v_halves(a);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/* 2^f for f in [-0.5, 0.5]: minimax polynomial, relative error 3e-9 before rounding. */
INLINE vec v_exp2_fraction(vec f) {
    vec p = v_fma(v_set(1.5594678e-4f), f, v_set(1.3406644e-3f));
    p = v_fma(p, f, v_set(9.6176930e-3f));
    p = v_fma(p, f, v_set(5.5503106e-2f));
    p = v_fma(p, f, v_set(2.4022653e-1f));
    p = v_fma(p, f, v_set(6.9314721e-1f));
    return v_fma(p, f, v_set(1.0f));
}

/* 2^x for x <= 0, relative error below 2e-7; below -125 it stays at 2^-125. NaN stays NaN. */
INLINE vec v_exp2(vec x) {
    x = v_max(v_set(-125.0f), x);
    vec whole = v_round(x);
    return v_scale2(v_exp2_fraction(v_sub(x, whole)), whole);
}

/* e^x, relative error below 2e-7; |x| is cut at 86. NaN stays NaN. */
INLINE vec v_exp(vec x) {
    x = v_min(v_set(86.0f), v_max(v_set(-86.0f), x));
    vec whole = v_round(v_mul(x, v_set(1.44269504f)));
    vec f = v_fma(x, v_set(1.44269504f), v_sub(v_zero(), whole));
    return v_scale2(v_exp2_fraction(v_fma(x, v_set(1.9259629e-8f), f)), whole);
}

/* tanh x: a polynomial near 0, where the formula by e^x would lose digits. */
INLINE vec v_tanh(vec x) {
    vec square = v_mul(x, x), size = v_abs(x);
    vec p = v_fma(v_set(-5.70498872745e-3f), square, v_set(2.06390887954e-2f));
    p = v_fma(p, square, v_set(-5.37397155531e-2f));
    p = v_fma(p, square, v_set(1.33314422036e-1f));
    p = v_fma(p, square, v_set(-3.33332819422e-1f));
    vec near = v_fma(v_mul(p, square), x, x);
    vec far = v_sub(v_set(1.0f), v_div(v_set(2.0f), v_add(v_exp(v_add(size, size)), v_set(1.0f))));
    return v_where(v_less(size, v_set(0.625f)), near, v_with_sign_of(far, x));
}
