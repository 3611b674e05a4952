/* Matrix products: which tiles are computed, in which order, and one whole product on torch's threads. */
#include <stdlib.h>

#include "gemm_tiles.h"
#include "rows.h"

/* Bytes of rows that go through all panels before the next rows do: they, a panel and the next one fit a second-level
   cache. */
#define ROWS_AT_ONCE (1 << 18)

/* Fewer products than this are done before a second thread has woken up. */
#define PARALLEL_PRODUCTS (1 << 18)

int64_t gemm_space(const Matrix *m, int64_t rows) { return m->format == GEMM_FP16 ? 0 : rows * gemm_row_bytes(m); }
int64_t gemm_panels(const Matrix *m) { return (m->outputs + PANEL - 1) / PANEL; }
int64_t gemm_panel_outputs(const Matrix *m) {
    (void)m;
    return PANEL;
}

static Tiles gemm_tiles(const Matrix *m) {
    return m->format == GEMM_FP16   ? gemm_fp16_tiles()
           : m->format == GEMM_INT8 ? gemm_int8_tiles()
                                    : gemm_int4_tiles();
}

/* Bytes of a panel's codes for one step of its tiles: a group, for fp16 an input. */
static int64_t gemm_step_bytes(const Matrix *m) {
    return PANEL * (m->format == GEMM_FP16 ? 2 : m->format == GEMM_INT8 ? GROUP : GROUP / 2);
}

static void gemm_panel_run(const Matrix *m, Tiles tiles, Tile tile, int64_t rows, int64_t panel) {
    const uint8_t *x = tile.x;
    float *out = tile.out;
    int64_t at = panel * PANEL, blocks = (rows + tiles.most - 1) / tiles.most;
    tile.codes = (const uint8_t *)m->codes + panel * tile.steps * gemm_step_bytes(m);
    tile.scales = m->scales ? (const uint16_t *)m->scales + at * tile.steps : 0;
    tile.minima = m->minima ? (const uint16_t *)m->minima + at * tile.steps : 0;
    tile.bias = m->bias ? m->bias + at : 0;
    tile.width = m->outputs - at < PANEL ? m->outputs - at : PANEL;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
        /* One block fetches all of the next panel, several share it; a single row is best left to the hardware. */
        tile.fetch = blocks > 1 ? block < 2 : rows > 1 || m->format == GEMM_INT4 ? 2 : 0;
        tile.ahead = tile.codes + tile.steps * gemm_step_bytes(m) + 64 * block;
        tile.x = x + first * tile.x_step;
        tile.out = out + first * tile.out_row + at;
        tiles.work[last - first - 1](&tile);
    }
}

void gemm_panels_run(const Matrix *m, const float *x, int64_t x_row, const void *space, int64_t rows,
                     int64_t first_panel, int64_t last_panel, float *out, int64_t out_row) {
    int floats = m->format == GEMM_FP16;
    Tile tile = {.x_step = floats ? x_row * 4 : gemm_row_bytes(m),
                 .steps = floats ? m->inputs : gemm_groups(m),
                 .out_row = out_row,
                 .multiplier = m->multiplier};
    Tiles tiles = gemm_tiles(m);
    int64_t parts = rows * tile.x_step / ROWS_AT_ONCE + 1;
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
        tile.x = (const uint8_t *)(floats ? (const void *)x : space) + first * tile.x_step;
        tile.out = out + first * out_row;
        for (int64_t panel = first_panel; panel < last_panel; panel++)
            gemm_panel_run(m, tiles, tile, last - first, panel);
    }
}

/* Mirrored by native_matrix.MULTIPLY. Rows are counted in floats. */
typedef struct {
    const Matrix *matrix;
    const float *x;
    float *out;
    int64_t x_row, out_row, rows;
    int32_t threads, reserved;
} MatrixMultiply;

static void multiply_part(const MatrixMultiply *a, const void *space, int64_t own, int64_t team) {
    int64_t panels = gemm_panels(a->matrix);
    gemm_panels_run(a->matrix, a->x, a->x_row, space, a->rows, panels * own / team, panels * (own + 1) / team, a->out,
                    a->out_row);
}

/* 0, or 1 if there is no memory for the prepared rows. */
EXPORT int matrix_multiply(const MatrixMultiply *a) {
    int64_t bytes = gemm_space(a->matrix, a->rows);
    void *space = bytes ? aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64)) : 0;
    if (bytes && !space) return 1;
#ifdef _OPENMP
    if (a->threads > 1 && a->rows * a->matrix->outputs * a->matrix->inputs >= PARALLEL_PRODUCTS) {
#pragma omp parallel num_threads(a->threads)
        {
            int64_t own = omp_get_thread_num(), team = omp_get_num_threads();
            gemm_prepare(a->matrix, a->x, a->x_row, a->rows * own / team, a->rows * (own + 1) / team, space);
#pragma omp barrier
            multiply_part(a, space, own, team);
        }
        free(space);
        return 0;
    }
#endif
    gemm_prepare(a->matrix, a->x, a->x_row, 0, a->rows, space);
    multiply_part(a, space, 0, 1);
    free(space);
    return 0;
}
