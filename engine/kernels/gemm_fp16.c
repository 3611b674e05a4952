/* Tiles of fp16 weights with fp32 activations and sums, one input after another. */
#include "gemm_tiles.h"

/* As int8_part. */
INLINE void fp16_part(const Tile *t, const int rows, const int columns, const int first) {
    vec sums[MOST_ROWS][MOST_COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) sums[r][c] = v_zero();
    const uint16_t *codes = (const uint16_t *)t->codes + first * W;
    const uint8_t *x = t->x, *ahead = t->ahead;
    for (int64_t k = 0; k < t->steps; k++) {
        if (first == 0 && k % 2 == 0) tile_fetch(t, ahead + k * PANEL * 2);
        vec w[MOST_COLUMNS];
        UNROLL for (int c = 0; c < columns; c++) w[c] = v_load_halves(codes + c * W);
        UNROLL for (int r = 0; r < rows; r++) {
            vec activation = v_set(one_float(x + r * t->x_step));
            UNROLL for (int c = 0; c < columns; c++) sums[r][c] = v_fma(w[c], activation, sums[r][c]);
        }
        codes += PANEL;
        x += 4;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) tile_store(t, r, (first + c) * W, sums[r][c]);
}

#ifdef __AVX512F__
#define COLUMNS(rows) 2
#else
#define COLUMNS(rows) ((rows) <= 2 ? 4 : 2)
#endif
#define TILE(rows)                                                                                                     \
    static void fp16_##rows(const Tile *t) {                                                                           \
        for (int first = 0; first < PANEL_VECTORS; first += COLUMNS(rows)) fp16_part(t, rows, COLUMNS(rows), first);   \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#ifdef __AVX512F__
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
#undef TILE
#undef COLUMNS

Tiles gemm_fp16_tiles(void) {
#ifdef __AVX512F__
    static const tile_work tiles[] = {fp16_1, fp16_2, fp16_3, fp16_4,  fp16_5,  fp16_6,
                                      fp16_7, fp16_8, fp16_9, fp16_10, fp16_11, fp16_12};
#else
    static const tile_work tiles[] = {fp16_1, fp16_2, fp16_3, fp16_4, fp16_5, fp16_6};
#endif
    return (Tiles){(int64_t)(sizeof tiles / sizeof *tiles), tiles};
}
