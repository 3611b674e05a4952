/* Matrix products with packed weights: y = x W^T + bias, W [outputs, inputs].

   The layout is the same for every instruction set, so packed weights can live in files. Outputs are cut into panels
   of 32, inputs into groups of 32, the last ones filled up with zeros; a quad is 4 inputs that follow each other:

     fp16  codes: _Float16 [panel][input][32 outputs]; no groups
     int8  codes: uint8 [panel][group][quad][32 outputs][4 inputs], code + 128;  scales: fp16 [panel][group][32]
           w = multiplier * scale * (code - 128)
     int4  codes: uint8 [panel][group][pair of quads][32 outputs][4 inputs], the first quad in the low nibble;
           scales, minima: fp16 [panel][group][32];  w = multiplier * (scale * nibble + minimum)

   For int8 and int4 each row of x is rounded to int8 with one scale per group (`gemm_prepare`). Sums are exact int32
   inside a group, and fp32 from group to group, in their order; fp16 sums its products in fp32 in the order of the
   inputs. So an output's bits depend on its row of x and its row of W alone, not on how the work is shared out. */
#pragma once

#include <stdint.h>

enum { GEMM_FP16, GEMM_INT8, GEMM_INT4 }; /* Matrix.format; native_matrix.FORMATS */

/* Mirrored by native_matrix.MATRIX. `group` is 32, and 0 for fp16; `bias` may be null. */
typedef struct {
    int32_t format, group;
    int64_t outputs, inputs;
    const void *codes, *scales, *minima;
    const float *bias;
    float multiplier;
    int32_t reserved;
} Matrix;

/* Bytes of the prepared form of so many rows, 0 if the kernel reads the floats themselves. It depends on format and
   inputs alone: matrices that agree in these may share a prepared form. Any address will do; 64-aligned is best. */
int64_t gemm_space(const Matrix *matrix, int64_t rows);

/* Rows [begin, end) of x into their places in `space`; any thread, any part. x_row: floats from row to row. */
void gemm_prepare(const Matrix *matrix, const float *x, int64_t x_row, int64_t begin, int64_t end, void *space);

/* Units of sharing out: panels, of so many outputs each. */
int64_t gemm_panels(const Matrix *matrix);
int64_t gemm_panel_outputs(const Matrix *matrix);

/* One thread's part: panels [first_panel, last_panel) of all rows, with bias. x is read for fp16 alone, `space` for
   the others. out_row: floats from row to row. */
void gemm_panels_run(const Matrix *matrix, const float *x, int64_t x_row, const void *space, int64_t rows,
                     int64_t first_panel, int64_t last_panel, float *out, int64_t out_row);
