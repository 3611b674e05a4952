/* The token of each row of logits: the largest, or one drawn by Gumbel noise, all of them or the truncated rest.

The noise is runtime/rng.py's: Philox4x64-10 bits, exactly; of its logarithms, 1e-5 may be wrong here. So a row says
whether its choice is closer than that, or the place of its cut: then the caller has to draw anew. */
#include <string.h>

#include "choose.h"

#define REACH 22.9f        /* no noise is more: 33 ln 2 */
#define MARGIN 1e-4f       /* between the best two, in which errors could decide */
#define CUT_MARGIN 4e-6    /* likewise, of the mass at which top_p cuts, */
#define MASS_MARGIN 2e-4   /* where the caller's own sum of all mass may have lost small parts */
#define FEW 16384          /* tokens that a truncation may leave */
#define AT_ONCE (256 / W)  /* vectors of lanes whose bits are made together */

/* Mirrored by native_choose.CHOOSE. */
typedef struct {
    const float *logits;
    const uint64_t *keys;  /* [rows, 5]: seed, choice, position, purpose, step; not read in greedy rows */
    const double *wishes;  /* [rows, 5]: temperature (0: greedy), least score, top_p, top_k (0: off), mass (0: unknown) */
    int64_t *tokens;
    float *largest, *second; /* of each row; NaN where it holds one */
    uint8_t *unsure;
    int64_t logits_row, rows, width;
    int32_t threads, unused;
} Choose;

/* ---- noise ------------------------------------------------------------------------------------------------------ */

#define PHILOX_M0 0xD2E7470EE14C6C93u
#define PHILOX_M1 0xCA5A826395121157u
#define PHILOX_W0 0x9E3779B97F4A7C15u
#define PHILOX_W1 0xBB67AE8584CAA73Bu

/* The counter after two rounds, as far as it does not depend on the block. */
typedef struct {
    uint64_t key0, key1, position, purpose, step;
    uint64_t high1, low1, high0, low0; /* of the first round's second product, of the second round's first one */
} ChooseKey;

INLINE uint64_t choose_product(uint64_t a, uint64_t b, uint64_t *low) {
    unsigned __int128 product = (unsigned __int128)a * b;
    *low = (uint64_t)product;
    return (uint64_t)(product >> 64);
}

static ChooseKey choose_key(const uint64_t *fields) {
    ChooseKey k = {fields[0], fields[1], fields[2], fields[3], fields[4], 0, 0, 0, 0};
    k.high1 = choose_product(PHILOX_M1, k.purpose, &k.low1);
    k.high0 = choose_product(PHILOX_M0, k.high1 ^ k.position ^ k.key0, &k.low0);
    return k;
}

/* The eight lanes of a block. */
INLINE void choose_philox(const ChooseKey *k, uint64_t block, uint64_t *out) {
    uint64_t low, high = choose_product(PHILOX_M0, block, &low);
    uint64_t c0, c1, c2 = high ^ k->step ^ k->key1, c3 = low;
    uint64_t key0 = k->key0 + PHILOX_W0, key1 = k->key1 + PHILOX_W1;
    high = choose_product(PHILOX_M1, c2, &low);
    c0 = high ^ k->low1 ^ key0, c1 = low, c2 = k->high0 ^ c3 ^ key1, c3 = k->low0;
    for (int turn = 2; turn < 10; turn++) {
        uint64_t low0, low1, high0 = choose_product(PHILOX_M0, c0, &low0), high1 = choose_product(PHILOX_M1, c2, &low1);
        key0 += PHILOX_W0, key1 += PHILOX_W1;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* log(1 + f) for f from sqrt(1/2) - 1 to sqrt(2) - 1, relative error 2e-7 before rounding. */
INLINE vec choose_log1p(vec f) {
    vec p = v_fma(v_set(-0.10135310f), f, v_set(0.16235997f));
    p = v_fma(p, f, v_set(-0.17247339f));
    p = v_fma(p, f, v_set(0.19898374f));
    p = v_fma(p, f, v_set(-0.24970034f));
    p = v_fma(p, f, v_set(0.33335119f));
    p = v_fma(p, f, v_set(-0.50000364f));
    return v_mul(f, v_fma(p, f, v_set(0.99999994f)));
}

#ifdef __AVX512F__
INLINE vec choose_float(const uint32_t *bits) { return _mm512_cvtepu32_ps(_mm512_loadu_si512(bits)); }
INLINE vec choose_split(vec x, vec *mantissa) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
    *mantissa = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
    return _mm512_cvtepi32_ps(exponent);
}
#else
INLINE vec choose_float(const uint32_t *bits) {
    __m256i all = _mm256_loadu_si256((const __m256i *)bits);
    vec high = _mm256_cvtepi32_ps(_mm256_srli_epi32(all, 16));
    vec low = _mm256_cvtepi32_ps(_mm256_and_si256(all, _mm256_set1_epi32(0xffff)));
    return v_fma(high, v_set(65536.0f), low); /* one rounding */
}
INLINE vec choose_split(vec x, vec *mantissa) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i exponent = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
    *mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
    return _mm256_cvtepi32_ps(exponent);
}
#endif

/* See rng.gumbel_of_bits: the same v, and its logarithms to about 1e-6. */
INLINE vec choose_noise(const uint32_t *bits) {
    const vec one = v_set(1.0f), ln2 = v_set(0.69314718f);
    vec v = v_fma(choose_float(bits), v_set(0x1p-32f), v_set(0x1p-33f)), mantissa;
    v = v_min(v_set(1.0f - 0x1p-24f), v);
    vec exponent = choose_split(v_sub(one, v), &mantissa);
    /* Where the exponent is 0, 1 - v may have lost digits of v. */
    vec f = v_where(v_less(v_abs(exponent), v_set(0.5f)), v_sub(v_zero(), v), v_sub(mantissa, one));
    vec waiting = v_sub(v_zero(), v_fma(exponent, ln2, choose_log1p(f)));
    exponent = choose_split(waiting, &mantissa);
    return v_sub(v_zero(), v_fma(exponent, ln2, choose_log1p(v_sub(mantissa, one))));
}

/* ---- drawing ---------------------------------------------------------------------------------------------------- */

typedef struct {
    float best, second;
    int64_t token;
} ChooseWinner;

INLINE void choose_offer(ChooseWinner *w, float total, int64_t token) {
    if (total > w->best) {
        w->second = w->best;
        w->best = total;
        w->token = token;
    } else if (total > w->second) {
        w->second = total;
    }
}

/* Offer all lanes of `totals` that may win or come so close that it matters. */
INLINE void choose_offers(ChooseWinner *w, vec totals, const int64_t *tokens, int64_t first) {
    uint32_t mask = choose_bits(v_less(v_set(w->best - 2 * MARGIN), totals));
    if (!mask) return;
    float values[W];
    v_store(values, totals);
    for (; mask; mask &= mask - 1) {
        int lane = __builtin_ctz(mask);
        choose_offer(w, values[lane], tokens ? tokens[lane] : first + lane);
    }
}

/* Among all tokens. Lanes that can't win, whatever their noise, get none. `likeliest` has the largest logit. */
static ChooseWinner choose_free(const float *x, int64_t width, int64_t likeliest, float heat, const ChooseKey *key) {
    ChooseWinner w = {-INFINITY, -INFINITY, 0};
    float largest = x[likeliest];
    uint32_t bits[AT_ONCE * W];
    int64_t places[AT_ONCE];
    uint64_t words[4];
    choose_philox(key, (uint64_t)(likeliest / 8), words);
    for (int lane = 0; lane < W; lane++) memcpy(bits + lane, (uint32_t *)words + likeliest % 8, 4);
    float known = v_lowest(choose_noise(bits)) - 2 * MARGIN; /* the winner has this at least */
    for (int64_t i = 0; i < width;) {
        vec bound = v_set((w.best - 2 * MARGIN > known ? w.best - 2 * MARGIN : known) - REACH);
        int count = 0;
        for (; i < width && count < AT_ONCE; i += W) {
            lanes m = v_first(width - i);
            vec score = v_mul(v_sub(v_load_at(x + i, m), v_set(largest)), v_set(heat));
            if (choose_bits(v_less(bound, score)) & choose_bits(m)) places[count++] = i;
        }
        for (int k = 0; k < count; k++)
            for (int block = 0; block < W / 8; block++) {
                choose_philox(key, (uint64_t)(places[k] / 8 + block), words);
                memcpy(bits + k * W + block * 8, words, sizeof words);
            }
        for (int k = 0; k < count; k++) {
            lanes m = v_first(width - places[k]);
            vec score = v_mul(v_sub(v_load_at(x + places[k], m), v_set(largest)), v_set(heat));
            vec total = v_where(m, v_add(score, choose_noise(bits + k * W)), v_set(-INFINITY));
            choose_offers(&w, total, 0, places[k]);
        }
    }
    return w;
}

typedef struct {
    float score;
    int32_t token;
} ChooseKept;

/* Stable, from the largest score to the smallest; scores are at most 0. */
static void choose_sort(ChooseKept *kept, ChooseKept *spare, int64_t count) {
    for (int shift = 0; shift < 32; shift += 11) {
        int32_t starts[2048] = {0};
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, &kept[i].score, 4);
            starts[((bits & 0x7fffffffu) >> shift) & 2047]++;
        }
        for (int32_t bin = 0, sum = 0; bin < 2048; bin++) {
            int32_t here = starts[bin];
            starts[bin] = sum;
            sum += here;
        }
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, &kept[i].score, 4);
            spare[starts[((bits & 0x7fffffffu) >> shift) & 2047]++] = kept[i];
        }
        memcpy(kept, spare, count * sizeof *kept);
    }
}

typedef struct {
    const float *x;
    int64_t width, limit;
    float largest, temperature, floor;
    double top_p, mass;
} ChooseCut;

/* Sum of exp(score) over all scores from the floor on. */
static double choose_mass(const ChooseCut *c) {
    double mass = 0.0;
    vec heat = v_set(1.0f / c->temperature), floor = v_set(c->floor);
    for (int64_t start = 0; start < c->width; start += 1024) {
        int64_t end = start + 1024 < c->width ? start + 1024 : c->width;
        vec sum = v_zero();
        for (int64_t i = start; i < end; i += W) {
            lanes m = v_first(end - i);
            vec score = v_mul(v_sub(v_load_at(c->x + i, m), v_set(c->largest)), heat);
            score = v_where(m, score, v_set(-INFINITY));
            vec part = v_where(v_less(score, floor), v_zero(), v_exp(score));
            sum = v_add(sum, v_where(v_less(score, v_set(-86.0f)), v_zero(), part));
        }
        mass += v_sum_of(sum);
    }
    return mass;
}

/* All tokens with scores of at least `from`, by id; -1 where they are too many. */
static int64_t choose_collect(const ChooseCut *c, float from, ChooseKept *kept) {
    int64_t count = 0;
    float least = from > c->floor ? from : c->floor;
    vec bound = v_set(least - 1e-4f - 1e-5f * fabsf(least)), heat = v_set(1.0f / c->temperature);
    for (int64_t i = 0; i < c->width; i += W) {
        lanes m = v_first(c->width - i);
        vec score = v_mul(v_sub(v_load_at(c->x + i, m), v_set(c->largest)), heat);
        for (uint32_t mask = choose_bits(v_less(bound, score)) & choose_bits(m); mask; mask &= mask - 1) {
            int64_t token = i + __builtin_ctz(mask);
            float exact = (c->x[token] - c->largest) / c->temperature;
            if (exact < least || exact == -INFINITY) continue;
            if (count == FEW) return -1;
            kept[count++] = (ChooseKept){exact, (int32_t)token};
        }
    }
    return count;
}

static double choose_exp(float score) {
    float out[W];
    v_store(out, v_exp(v_set(score)));
    return score < -86.0f ? 0.0 : out[0];
}

/* The tokens that stay, best first, at most FEW; -1 where these are too few or it can't be told. */
static int64_t choose_cut(const ChooseCut *c, ChooseKept *kept, ChooseKept *spare) {
    double bound = 0.0, margin = CUT_MARGIN;
    if (c->top_p < 1.0 && !c->limit) {
        bound = c->top_p * (c->mass > 0.0 ? c->mass : choose_mass(c));
        if (c->mass <= 0.0) margin = MASS_MARGIN;
    }
    int whole = c->top_p >= 1.0 && !c->limit;
    int64_t count = 0;
    for (float from = -1.0f;; from = from < -1000.0f ? -INFINITY : 1.6f * from) {
        if (whole) from = -INFINITY;
        count = choose_collect(c, from, kept);
        if (count < 0) return -1;
        if (from <= c->floor || from == -INFINITY) break; /* these are all */
        if (c->limit && count >= c->limit) break;
        if (c->limit) continue;
        double mass = 0.0;
        for (int64_t i = 0; i < count; i++) mass += choose_exp(kept[i].score);
        if (mass > bound * (1.0 + 2.0 * margin)) break;
    }
    if (whole) return count;
    choose_sort(kept, spare, count);
    if (c->limit && count > c->limit) count = c->limit;
    if (c->top_p >= 1.0) return count;
    double mass = 0.0;
    if (c->limit) {
        for (int64_t i = 0; i < count; i++) mass += choose_exp(kept[i].score);
        bound = c->top_p * mass;
        mass = 0.0;
    }
    for (int64_t size = 1; size <= count; size++) {
        mass += choose_exp(kept[size - 1].score);
        if (mass < bound * (1.0 - margin)) continue;
        return mass > bound * (1.0 + margin) ? size : -1;
    }
    return -1;
}

/* 1 where the choice is too close. */
static int choose_drawn(const Choose *a, int64_t row, float largest) {
    int64_t likeliest = a->tokens[row];
    const double *wish = a->wishes + 5 * row;
    const float *x = a->logits + row * a->logits_row;
    float temperature = (float)wish[0];
    ChooseKey key = choose_key(a->keys + 5 * row);
    ChooseWinner w = {-INFINITY, -INFINITY, 0};
    if (wish[1] == -INFINITY && wish[2] >= 1.0 && wish[3] == 0.0) {
        w = choose_free(x, a->width, likeliest, 1.0f / temperature, &key);
    } else {
        ChooseKept kept[FEW], spare[FEW];
        ChooseCut cut = {x, a->width, (int64_t)wish[3], largest, temperature, (float)wish[1], wish[2], wish[4]};
        int64_t count = choose_cut(&cut, kept, spare);
        if (count <= 0) return 1;
        for (int64_t i = 0; i < count; i += W) {
            uint32_t bits[W] = {0};
            float scores[W];
            int64_t tokens[W];
            for (int lane = 0; lane < W; lane++) {
                int some = i + lane < count;
                uint32_t words[8];
                scores[lane] = some ? kept[i + lane].score : -INFINITY;
                tokens[lane] = some ? kept[i + lane].token : 0;
                if (!some) continue;
                choose_philox(&key, (uint64_t)(tokens[lane] / 8), (uint64_t *)words);
                bits[lane] = words[tokens[lane] % 8];
            }
            choose_offers(&w, v_add(v_load(scores), choose_noise(bits)), tokens, 0);
        }
    }
    a->tokens[row] = w.token;
    return !(w.best - w.second >= MARGIN);
}

static void choose_row(const Choose *a, int64_t row) {
    ChoosePeak peak = choose_peak(a->logits + row * a->logits_row, a->width);
    a->tokens[row] = peak.index;
    a->largest[row] = peak.best;
    a->unsure[row] = 0;
    a->second[row] = peak.second;
    if (a->wishes && a->wishes[5 * row] > 0.0 && isfinite(peak.best)) a->unsure[row] = choose_drawn(a, row, peak.best);
}

/* 0. */
EXPORT int choose_tokens(const Choose *task) {
#ifdef _OPENMP
    if (task->threads > 1 && task->rows > 1 && task->rows * task->width >= 65536) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(task->threads)
        for (int64_t row = 0; row < task->rows; row++) choose_row(task, row);
        return 0;
    }
#endif
    for (int64_t row = 0; row < task->rows; row++) choose_row(task, row);
    return 0;
}

/* Mirrored by native_choose.NOISE. */
typedef struct {
    const uint64_t *key; /* [5] */
    uint32_t *bits;
    float *noise;
    int64_t count; /* lanes, from 0 on; a multiple of 16 */
} ChooseNoise;

/* What the choices above are made with, to be compared with rng.py. 0. */
EXPORT int choose_noise_of(const ChooseNoise *task) {
    ChooseKey key = choose_key(task->key);
    for (int64_t i = 0; i < task->count; i += 8) choose_philox(&key, (uint64_t)(i / 8), (uint64_t *)(task->bits + i));
    for (int64_t i = 0; i < task->count; i += W) v_store(task->noise + i, choose_noise(task->bits + i));
    return 0;
}
