/* Tiles of int8 weights: symmetric codes, stored + 128. */
#include "gemm_tiles.h"

/* `rows` rows, `columns` vectors of the panel from vector `first` on; constants, so that sums stay in registers. */
INLINE void int8_part(const Tile *t, const int rows, const int columns, const int first) {
    const int quads = GROUP / 4, group_bytes = quads * QUAD_BYTES + GROUP_EXTRA;
    vec sums[MOST_ROWS][MOST_COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) sums[r][c] = v_zero();
    const uint8_t *codes = t->codes + first * W * 4, *x = t->x, *ahead = t->ahead;
    const uint16_t *scales = t->scales + first * W;
    for (int64_t g = 0; g < t->steps; g++) {
        ivec dots[MOST_ROWS][MOST_COLUMNS];
        UNROLL for (int r = 0; r < rows; r++) {
            ivec start = i_set(four_bytes(x + r * t->x_step + quads * QUAD_BYTES + 4));
            UNROLL for (int c = 0; c < columns; c++) dots[r][c] = start;
        }
        UNROLL for (int q = 0; q < quads; q++) {
            if (first == 0) tile_fetch(t, ahead + q * PANEL * 4);
            ivec w[MOST_COLUMNS];
            UNROLL for (int c = 0; c < columns; c++) w[c] = i_load(codes + (q * PANEL + c * W) * 4);
            UNROLL for (int r = 0; r < rows; r++) {
                const int8_t *quad = (const int8_t *)x + r * t->x_step + q * QUAD_BYTES;
                UNROLL for (int c = 0; c < columns; c++) dots[r][c] = i_dot_bytes(dots[r][c], w[c], quad);
            }
        }
        UNROLL for (int c = 0; c < columns; c++) {
            vec scale = v_load_halves(scales + c * W);
            UNROLL for (int r = 0; r < rows; r++) {
                vec both = v_mul(scale, v_set(one_float(x + r * t->x_step + quads * QUAD_BYTES)));
                sums[r][c] = v_fma(i_float(dots[r][c]), both, sums[r][c]);
            }
        }
        codes += PANEL * GROUP;
        scales += PANEL;
        x += group_bytes;
        ahead += PANEL * GROUP;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) tile_store(t, r, (first + c) * W, sums[r][c]);
}

#ifdef __AVX512F__
#define COLUMNS(rows) 2
#else
#define COLUMNS(rows) ((rows) == 1 ? 4 : (rows) < 4 ? 2 : 1)
#endif
#define TILE(rows)                                                                                                     \
    static void int8_##rows(const Tile *t) {                                                                           \
        for (int first = 0; first < PANEL_VECTORS; first += COLUMNS(rows)) int8_part(t, rows, COLUMNS(rows), first);   \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#undef TILE
#undef COLUMNS

Tiles gemm_int8_tiles(void) {
    static const tile_work tiles[] = {int8_1, int8_2, int8_3, int8_4, int8_5, int8_6};
    return (Tiles){6, tiles};
}
