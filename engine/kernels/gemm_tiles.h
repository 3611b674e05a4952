/* What the kernels of the three formats share: a tile is some rows of x times one panel. */
#pragma once

#include "gemm.h"
#include "gemm_vectors.h"

#define PANEL 32
#define GROUP 32 /* 64 is a tenth faster at many rows, at twice the error: activations are rounded by group too */
#define PANEL_VECTORS (PANEL / W)
#define UNROLL _Pragma("GCC unroll 32")
#define MOST_ROWS 12 /* of any tile; arrays of constant size become registers */
#define MOST_COLUMNS 4

/* Behind the activations of each group in a prepared row, 8 bytes: the row's scale there, and what the kernel adds up
   for offsets of the codes: int8 starts its sums at -128 * (sum of the row's codes), int4 has scale * (their sum). */
#define GROUP_EXTRA 8

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales, *minima;
    const uint8_t *ahead; /* what will be needed next: while this tile is computed, of each two lines there */
    int64_t fetch;        /* so many are fetched */
    const uint8_t *x;           /* prepared rows, for fp16 floats */
    int64_t x_step;             /* bytes from row to row */
    int64_t steps;              /* groups, for fp16 inputs */
    float *out;
    int64_t out_row;            /* floats from row to row */
    int64_t width;              /* outputs of this panel, below PANEL in the last one */
    const float *bias;          /* of this panel, or null */
    float multiplier;
} Tile;

typedef void (*tile_work)(const Tile *tile);

/* work[r - 1] computes tiles of r rows. */
typedef struct {
    int64_t most;
    const tile_work *work;
} Tiles;

Tiles gemm_fp16_tiles(void);
Tiles gemm_int8_tiles(void);
Tiles gemm_int4_tiles(void);

static inline int64_t gemm_groups(const Matrix *m) { return (m->inputs + GROUP - 1) / GROUP; }

/* Bytes of one group of a prepared row. */
static inline int64_t gemm_group_bytes(const Matrix *m) {
    return GROUP * (m->format == GEMM_INT8 && WIDE_QUADS ? 2 : 1) + GROUP_EXTRA;
}

/* A whole number of cache lines. */
static inline int64_t gemm_row_bytes(const Matrix *m) { return (gemm_groups(m) * gemm_group_bytes(m) + 63) / 64 * 64; }

INLINE float one_float(const void *p) {
    float value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

/* The sums of one row for outputs [first, first + W) of the panel. */
INLINE void tile_store(const Tile *t, int64_t row, int64_t first, vec sums) {
    float *out = t->out + row * t->out_row + first;
    if (first + W <= t->width) {
        vec bias = t->bias ? v_load(t->bias + first) : v_zero();
        v_store(out, v_fma(sums, v_set(t->multiplier), bias));
    } else {
        lanes some = v_first(t->width - first);
        vec bias = t->bias ? v_load_at(t->bias + first, some) : v_zero();
        v_store_at(out, v_fma(sums, v_set(t->multiplier), bias), some);
    }
}

/* Called once for each two lines of codes that are read. */
INLINE void tile_fetch(const Tile *t, const uint8_t *two_lines) {
    if (t->fetch) {
        _mm_prefetch((const char *)two_lines, _MM_HINT_T1);
        if (t->fetch > 1) _mm_prefetch((const char *)two_lines + 64, _MM_HINT_T1);
    }
}
