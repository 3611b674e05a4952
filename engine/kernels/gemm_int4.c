/* Tiles of int4 weights with minima. */
#include "gemm_tiles.h"

/* As int8_part. */
INLINE void int4_part(const Tile *t, const int rows, const int columns, const int first) {
    const int group_bytes = GROUP + GROUP_EXTRA;
    vec sums[MOST_ROWS][MOST_COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) sums[r][c] = v_zero();
    const uint8_t *codes = t->codes + first * W * 4, *x = t->x, *ahead = t->ahead;
    const uint16_t *scales = t->scales + first * W, *minima = t->minima + first * W;
    for (int64_t g = 0; g < t->steps; g++) {
        ivec dots[MOST_ROWS][MOST_COLUMNS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int c = 0; c < columns; c++) dots[r][c] = i_set(0);
        UNROLL for (int pair = 0; pair < GROUP / 8; pair++) {
            if (first == 0) tile_fetch(t, ahead + pair * PANEL * 4);
            ivec w[MOST_COLUMNS];
            UNROLL for (int c = 0; c < columns; c++) w[c] = i_load(codes + (pair * PANEL + c * W) * 4);
            UNROLL for (int half = 0; half < 2; half++) {
                ivec nibbles[MOST_COLUMNS];
                UNROLL for (int c = 0; c < columns; c++)
                    nibbles[c] = half ? i_high_nibbles(w[c]) : i_and(w[c], i_set(0x0f0f0f0f));
                UNROLL for (int r = 0; r < rows; r++) {
                    const int8_t *quad = (const int8_t *)x + r * t->x_step + pair * 8 + half * 4;
                    UNROLL for (int c = 0; c < columns; c++) dots[r][c] = i_dot_nibbles(dots[r][c], nibbles[c], quad);
                }
            }
        }
        UNROLL for (int c = 0; c < columns; c++) {
            vec scale = v_load_halves(scales + c * W), minimum = v_load_halves(minima + c * W);
            UNROLL for (int r = 0; r < rows; r++) {
                const uint8_t *extra = x + r * t->x_step + GROUP;
                vec both = v_mul(scale, v_set(one_float(extra)));
                sums[r][c] = v_fma(i_float(i_nibble_sums(dots[r][c])), both, sums[r][c]);
                sums[r][c] = v_fma(minimum, v_set(one_float(extra + 4)), sums[r][c]);
            }
        }
        codes += PANEL * GROUP / 2;
        scales += PANEL;
        minima += PANEL;
        x += group_bytes;
        ahead += PANEL * GROUP / 2;
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
    static void int4_##rows(const Tile *t) {                                                                           \
        for (int first = 0; first < PANEL_VECTORS; first += COLUMNS(rows)) int4_part(t, rows, COLUMNS(rows), first);   \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#undef TILE
#undef COLUMNS

Tiles gemm_int4_tiles(void) {
    static const tile_work tiles[] = {int4_1, int4_2, int4_3, int4_4, int4_5, int4_6};
    return (Tiles){6, tiles};
}
