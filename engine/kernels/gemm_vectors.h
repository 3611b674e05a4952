/* Vectors of W int32 beside those of vec.h, for packed codes: dot products of uint8 weights with int8 activations. */
#pragma once

#include "vec.h"

#ifdef __AVX512F__
typedef __m512i ivec;

INLINE ivec i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE ivec i_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ivec i_and(ivec a, ivec b) { return _mm512_and_si512(a, b); }
INLINE ivec i_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
INLINE ivec i_high_bytes(ivec a) { return _mm512_srli_epi16(a, 8); }
INLINE ivec i_high_nibbles(ivec a) { return i_and(_mm512_srli_epi16(a, 4), i_set(0x0f0f0f0f)); }
INLINE ivec i_multiply_pairs(ivec a, ivec b) { return _mm512_madd_epi16(a, b); }
INLINE vec i_float(ivec a) { return _mm512_cvtepi32_ps(a); }
INLINE ivec v_nearest(vec a) { return _mm512_cvtps_epi32(a); } /* ties to even */
INLINE int32_t i_sum_of(ivec a) { return _mm512_reduce_add_epi32(a); }
INLINE ivec i_max(ivec a, ivec b) { return _mm512_max_epi32(a, b); }
INLINE int32_t i_max_of(ivec a) { return _mm512_reduce_max_epi32(a); }
INLINE ivec i_bits_of(vec a) { return _mm512_castps_si512(a); }
INLINE vec v_load_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void i_store_bytes(int8_t *p, ivec a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
/* As int16, of each four the first, third, second and fourth. */
INLINE void i_store_pairs(int8_t *p, ivec a) {
    __m256i words = _mm512_cvtepi32_epi16(a);
    _mm256_storeu_si256((__m256i *)p, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
}
#else
typedef __m256i ivec;

INLINE ivec i_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE ivec i_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE ivec i_and(ivec a, ivec b) { return _mm256_and_si256(a, b); }
INLINE ivec i_add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
INLINE ivec i_high_bytes(ivec a) { return _mm256_srli_epi16(a, 8); }
INLINE ivec i_high_nibbles(ivec a) { return i_and(_mm256_srli_epi16(a, 4), i_set(0x0f0f0f0f)); }
INLINE ivec i_multiply_pairs(ivec a, ivec b) { return _mm256_madd_epi16(a, b); }
INLINE vec i_float(ivec a) { return _mm256_cvtepi32_ps(a); }
INLINE ivec v_nearest(vec a) { return _mm256_cvtps_epi32(a); }
INLINE int32_t i_sum_of(ivec a) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
INLINE ivec i_max(ivec a, ivec b) { return _mm256_max_epi32(a, b); }
INLINE int32_t i_max_of(ivec a) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
INLINE ivec i_bits_of(vec a) { return _mm256_castps_si256(a); }
INLINE vec v_load_halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE __m128i i_words(ivec a) { return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
INLINE void i_store_bytes(int8_t *p, ivec a) {
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(i_words(a), i_words(a)));
}
INLINE void i_store_pairs(int8_t *p, ivec a) {
    _mm_storeu_si128((__m128i *)p, _mm_shufflehi_epi16(_mm_shufflelo_epi16(i_words(a), 0xd8), 0xd8));
}
#endif

INLINE int32_t four_bytes(const void *p) {
    int32_t value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

/* One quad for W outputs: sums + codes (uint8) times 4 activations, in one instruction or in halves of 16 bits. With
   `WIDE_QUADS` the activations of int8 products are int16: the first and third, then the second and fourth. */
#ifdef __AVX512VNNI__
#define WIDE_QUADS 0
#define QUAD_BYTES 4
INLINE ivec i_dot_bytes(ivec sums, ivec codes, const int8_t *quad) {
    return _mm512_dpbusd_epi32(sums, codes, i_set(four_bytes(quad)));
}
INLINE ivec i_dot_nibbles(ivec sums, ivec nibbles, const int8_t *quad) { return i_dot_bytes(sums, nibbles, quad); }
INLINE ivec i_nibble_sums(ivec sums) { return sums; }
#else
#define WIDE_QUADS 1
#define QUAD_BYTES 8
INLINE ivec i_dot_bytes(ivec sums, ivec codes, const int8_t *quad) {
    ivec even = i_and(codes, i_set(0x00ff00ff)), odd = i_high_bytes(codes);
    sums = i_add(sums, i_multiply_pairs(even, i_set(four_bytes(quad))));
    return i_add(sums, i_multiply_pairs(odd, i_set(four_bytes(quad + 4))));
}
/* Sums of 16 bits: 8 quads of nibbles come to 8 * 2 * 15 * 127 = 30480 at most. */
INLINE ivec i_dot_nibbles(ivec sums, ivec nibbles, const int8_t *quad) {
    ivec activations = i_set(four_bytes(quad));
#ifdef __AVX512F__
    return _mm512_add_epi16(sums, _mm512_maddubs_epi16(nibbles, activations));
#else
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, activations));
#endif
}
INLINE ivec i_nibble_sums(ivec sums) { return i_multiply_pairs(sums, i_set(0x00010001)); }
#endif
