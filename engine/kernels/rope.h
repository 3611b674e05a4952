/* From a merged query/key/value product to normed and rotated queries, and keys and values in the pool. */
#pragma once

#include "vec.h"

/* Mirrored by native.ROPE_WRITE. Rows are counted in elements. */
typedef struct {
    const float *qkv, *cos, *sin; /* cos and sin may be null with rotary = 0 */
    const float *query_norm, *key_norm; /* or null */
    const int64_t *slots;
    float *query;
    void *pool;
    int64_t qkv_row, cos_row, sin_row, pool_row, rows, num_slots;
    int64_t heads, kv_heads, key_dim, value_dim, rotary;
    int64_t query_norm_width, key_norm_width; /* what one norm is taken over */
    float eps, offset;
    int32_t interleaved, threads, pool_type; /* pool_type 0: float, 1: half */
} RopeWrite;

/* Rows [begin, end), by one thread: 0, or 1 if a slot lies outside the pool (the other rows are done). */
int rope_write_rows(const RopeWrite *a, int64_t begin, int64_t end);
