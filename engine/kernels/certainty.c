/* How sure a row of logits is: softmax in double precision, summed in an order of its own. */
#include <string.h>

#include "choose.h"

/* Mirrored by native_certainty.CERTAINTY. */
typedef struct {
    const float *logits;
    const int64_t *tokens;
    double *out; /* [3, rows]: the token's probability, that of the best less that of the next, sum of p log p */
    int64_t logits_row, rows, width;
    int32_t threads, unused;
} Certainty;

/* e^x for x <= 0, relative error below 1e-15; e^-700 for all that is less. */
INLINE double certainty_exp(double x) {
    const double magic = 0x1.8p52;
    x = x > -700.0 ? x : -700.0;
    double shifted = x * 0x1.71547652b82fep0 + magic, whole = shifted - magic;
    double f = x - whole * 0x1.62e42fefa39efp-1 - whole * 0x1.abc9e3b39803fp-56;
    double p = 1.0 / 6227020800.0;
    p = p * f + 1.0 / 479001600.0;
    p = p * f + 1.0 / 39916800.0;
    p = p * f + 1.0 / 3628800.0;
    p = p * f + 1.0 / 362880.0;
    p = p * f + 1.0 / 40320.0;
    p = p * f + 1.0 / 5040.0;
    p = p * f + 1.0 / 720.0;
    p = p * f + 1.0 / 120.0;
    p = p * f + 1.0 / 24.0;
    p = p * f + 1.0 / 6.0;
    p = p * f + 0.5;
    p = p * f + 1.0;
    p = p * f + 1.0;
    int64_t bits, exponent;
    memcpy(&bits, &p, 8);
    memcpy(&exponent, &shifted, 8);
    bits += (int64_t)((uint64_t)exponent << 52);
    memcpy(&p, &bits, 8);
    return p;
}

static void certainty_row(const Certainty *a, int64_t row) {
    enum { LANES = 16, CHUNK = 256 };
    const float *x = a->logits + row * a->logits_row;
    ChoosePeak peak = choose_peak(x, a->width);
    double *out = a->out + row, sums[LANES] = {0}, weighed[LANES] = {0};
    if (!isfinite(peak.best)) {
        out[0] = out[a->rows] = out[2 * a->rows] = NAN;
        return;
    }
    double largest = peak.best;
    for (int64_t start = 0; start < a->width; start += CHUNK) {
        double score[CHUNK], power[CHUNK];
        int64_t size = a->width - start < CHUNK ? a->width - start : CHUNK;
        for (int64_t i = 0; i < size; i++) score[i] = (double)x[start + i] - largest;
        for (int64_t i = size; i < CHUNK; i++) score[i] = -1e300;
        for (int i = 0; i < CHUNK; i++) score[i] = score[i] > -1e300 ? score[i] : -1e300;
        for (int i = 0; i < CHUNK; i++) power[i] = certainty_exp(score[i]);
        for (int i = 0; i < CHUNK; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                sums[lane] += power[i + lane];
                weighed[lane] += power[i + lane] * (score[i + lane] > -700.0 ? score[i + lane] : -700.0);
            }
    }
    double sum = 0.0, weight = 0.0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane], weight += weighed[lane];
    double token = (double)x[a->tokens[row]] - largest, next = (double)peak.second - largest;
    out[0] = (token > -700.0 ? certainty_exp(token) : 0.0) / sum;
    out[a->rows] = a->width > 1 ? (1.0 - (next > -700.0 ? certainty_exp(next) : 0.0)) / sum : 0.0;
    out[2 * a->rows] = weight / sum - log(sum);
}

/* 0. */
EXPORT int certainty_of(const Certainty *task) {
#ifdef _OPENMP
    if (task->threads > 1 && task->rows > 1 && task->rows * task->width >= 16384) {
#pragma omp parallel for schedule(static) num_threads(task->threads)
        for (int64_t row = 0; row < task->rows; row++) certainty_row(task, row);
        return 0;
    }
#endif
    for (int64_t row = 0; row < task->rows; row++) certainty_row(task, row);
    return 0;
}
