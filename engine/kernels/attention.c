/* Planning, the loop over units of work, and the joining of splits. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define ENOUGH 4 /* units per thread; where there are less of few rows, each head is one of its own */
#define LEAST_ROWS 24 /* of a task of many rows, however many threads there are */
#define PARALLEL_WORK 400000 /* products; below, some 15 us of work, no other thread is woken */

static int64_t heads_of(const Problem *p, const Task *task) { return task->head < 0 ? p->kv_heads : 1; }

/* One split's partial result: values [rows][value_dim], then maxima and sums [rows]. */
static int64_t partial_width(const Problem *p) { return p->value_dim + 2; }

/* What the rows of a task see together. In a tree a later row may see less than an earlier one. */
static Range rows_range(const Layer *layer, const Task *task) {
    Range all = row_range(layer, task, 0), last = row_range(layer, task, task->rows - 1);
    all.high = last.high;
    if (layer->problem->mode == TREE)
        for (int64_t row = 0; row < task->rows; row += layer->fold) {
            Range seen = row_range(layer, task, row);
            all = (Range){min64(all.low, seen.low), max64(all.high, seen.high)};
        }
    return all;
}

static void add_task(Plan *plan, const Problem *p, Task task) {
    int64_t rows = heads_of(p, &task) * task.rows, padded = round_up(rows, MR);
    task.splits = task.few ? max64(1, (task.keys.high + FEW_SPLIT - 1) / FEW_SPLIT - task.keys.low / FEW_SPLIT) : 1;
    if (plan->tasks) {
        Task *to = plan->tasks + plan->num_tasks;
        *to = task;
        to->partials = plan->partials + plan->partial_floats;
        atomic_init(&to->remaining, (int)task.splits);
        for (int32_t split = 0; split < task.splits; split++)
            plan->units[plan->num_units + split] = (KeyUnit){(int32_t)plan->num_tasks, split};
    }
    int64_t packed = rows * round_up(p->key_dim, W);
    if (!task.few)
        packed = (TILE_KEYS + padded) * p->key_dim + TILE_KEYS * plan->value_stride + MR * TILE_KEYS;
    plan->packed_floats = max64(plan->packed_floats, round_up(packed, 16));
    plan->result_floats = max64(plan->result_floats, round_up(padded * (plan->value_stride + 2), 16));
    plan->num_tasks++;
    plan->num_units += task.splits;
    if (task.splits > 1) plan->partial_floats += round_up(task.splits * rows * partial_width(p), 16);
    int64_t products = rows * (task.keys.high - task.keys.low) * (p->key_dim + p->value_dim);
    plan->products += task.few ? products : products / 2; /* few rows wait for memory */
}

/* Folded rows of a task of many rows: fewer than a tile's where there are too few tasks for all threads. */
static int64_t tile_height(const Problem *p, int64_t rows, int threads) {
    int64_t wanted = (ENOUGH * threads + p->num_seqs * p->kv_heads - 1) / (p->num_seqs * p->kv_heads);
    int64_t tiles = max64((rows + TILE_ROWS - 1) / TILE_ROWS, threads > 1 ? min64(wanted, rows / LEAST_ROWS) : 1);
    return round_up((rows + tiles - 1) / tiles, MR);
}

/* The tasks of one sequence, the costliest first. */
static void plan_sequence(Plan *plan, const Problem *p, int64_t seq, int few, int threads) {
    int64_t tokens = p->starts[seq + 1] - p->starts[seq], rows = tokens * plan->fold;
    if (rows <= 0 || (tokens <= FEW_TOKENS && rows <= FEW_ROWS) != few) return;
    const Layer layer = {p, plan->fold, plan->value_stride, &plan->stray};
    int64_t height = few ? rows : tile_height(p, rows, threads), tiles = (rows + height - 1) / height;
    int64_t heads = few && !plan->by_head ? 1 : p->kv_heads, count = tiles * heads;
    for (int64_t i = 0; i < count; i++) {
        Task task = {.seq = seq, .head = few && !plan->by_head ? -1 : i % heads, .few = few};
        task.first_row = (tiles - 1 - i / heads) * height;
        task.rows = min64(height, rows - task.first_row);
        task.keys = rows_range(&layer, &task);
        add_task(plan, p, task);
    }
}

/* Many rows come first, so that no thread is left with a long sequence at the end. */
static void plan_sequences(Plan *plan, const Problem *p, int threads) {
    plan->num_tasks = plan->num_units = plan->partial_floats = plan->products = 0;
    plan->result_floats = plan->packed_floats = 0;
    for (int few = 0; few < 2; few++)
        for (int64_t seq = 0; seq < p->num_seqs; seq++) plan_sequence(plan, p, seq, few, threads);
}

/* Whether every sequence's queries lie in the batch, and there is a block to read at all. */
static int in_bounds(const Problem *p) {
    for (int64_t seq = 0; seq < p->num_seqs; seq++)
        if (p->starts[seq] < 0 || p->starts[seq + 1] < p->starts[seq] || p->starts[seq + 1] > p->num_tokens) return 0;
    return p->num_slots >= p->block_size || p->num_tokens == 0;
}

static void count_tasks(Plan *plan, const Problem *p, int threads) {
    *plan = (Plan){.fold = p->heads / p->kv_heads, .value_stride = round_up(p->value_dim, NR)};
    plan_sequences(plan, p, threads);
    plan->by_head = threads > 1 && plan->num_units < ENOUGH * threads;
    if (plan->by_head) plan_sequences(plan, p, threads);
}

int64_t attention_space(const Problem *p, int threads) {
    Plan plan;
    if (!in_bounds(p)) return -1;
    count_tasks(&plan, p, threads);
    size_t units = sizeof(KeyUnit) * (size_t)plan.num_units, tasks = sizeof(Task) * (size_t)plan.num_tasks;
    int64_t floats = plan.partial_floats + threads * (plan.result_floats + plan.packed_floats);
    return round_up(4 * floats + (int64_t)(units + tasks), 64) + 64;
}

void attention_plan(Plan *plan, const Problem *p, int threads, void *space) {
    count_tasks(plan, p, threads);
    plan->scratch = space;
    plan->partials = plan->scratch + threads * (plan->result_floats + plan->packed_floats);
    plan->tasks = (Task *)(plan->partials + plan->partial_floats);
    plan->units = (KeyUnit *)(plan->tasks + plan->num_tasks);
    plan_sequences(plan, p, threads);
}

int attention_stray(const Plan *plan) { return atomic_load(&plan->stray); }

/* Normalise a row and put it where it belongs; a row that saw nothing is 0. */
static void emit(const Layer *layer, const Task *task, int64_t row, const float *values, float maximum, float sum) {
    const Problem *p = layer->problem;
    int64_t head = task->head < 0 ? row / task->rows : task->head, folded = task->first_row + row % task->rows;
    int64_t token = p->starts[task->seq] + folded / layer->fold, query_head = head * layer->fold + folded % layer->fold;
    float *out = p->out + (token * p->heads + query_head) * p->value_dim;
    float by = 1.0f;
    if (p->sinks) { /* one more key, which takes weight and gives no value */
        float sink = p->sinks[query_head] * LOG2E, most = fmaxf(sink, maximum);
        by = exp2f(maximum - most);
        sum = sum * by + exp2f(sink - most);
    }
    by = sum == 0.0f ? 0.0f : by / sum;
    scaled(out, values, by, p->value_dim, 0);
}

/* Join the splits of a task in their order. */
static void join_splits(const Layer *layer, const Task *task) {
    const Problem *p = layer->problem;
    int64_t rows = heads_of(p, task) * task->rows, size = rows * partial_width(p), width = p->value_dim;
    for (int64_t row = 0; row < rows; row++) {
        float *values = task->partials + row * width;
        float *maximum = task->partials + rows * width + row, *sum = maximum + rows;
        for (int64_t split = 1; split < task->splits; split++) {
            const float *other = values + split * size;
            float theirs = maximum[split * size], most = fmaxf(*maximum, theirs);
            float mine = *maximum == most ? 1.0f : exp2f(*maximum - most);
            float by = theirs == most ? 1.0f : exp2f(theirs - most);
            for (int64_t i = 0; i < width; i++) values[i] = values[i] * mine + other[i] * by;
            *sum = *sum * mine + sum[split * size] * by;
            *maximum = most;
        }
        emit(layer, task, row, values, *maximum, *sum);
    }
}

static void finish_unit(const Layer *layer, Task *task, int64_t split, const Gathered *done) {
    const Problem *p = layer->problem;
    int64_t rows = heads_of(p, task) * task->rows, width = p->value_dim;
    if (task->splits == 1) {
        for (int64_t row = 0; row < rows; row++)
            emit(layer, task, row, done->values + row * done->stride, done->maxima[row], done->sums[row]);
        return;
    }
    float *to = task->partials + split * rows * partial_width(p);
    for (int64_t row = 0; row < rows; row++)
        memcpy(to + row * width, done->values + row * done->stride, width * sizeof(float));
    memcpy(to + rows * width, done->maxima, rows * sizeof(float));
    memcpy(to + rows * (width + 1), done->sums, rows * sizeof(float));
    if (atomic_fetch_sub(&task->remaining, 1) == 1) {
        atomic_store(&task->remaining, (int)task->splits);
        join_splits(layer, task);
    }
}

static void attend_unit(const Layer *layer, Task *task, int64_t split, float *results, float *packed) {
    int64_t rows = heads_of(layer->problem, task) * task->rows, padded = round_up(rows, MR);
    Range keys = task->keys;
    if (task->few) { /* steps begin at multiples of their length, so some keys may lie before what is seen */
        int64_t first = task->keys.low / FEW_SPLIT + split;
        keys.low = max64(first * FEW_SPLIT, task->keys.low / FEW_KEYS * FEW_KEYS);
        keys.high = min64((first + 1) * FEW_SPLIT, task->keys.high);
    } else
        keys.low = task->keys.low / TILE_KEYS * TILE_KEYS;
    Gathered done = {results, 0, 0, layer->value_stride};
    done.maxima = done.values + padded * done.stride;
    done.sums = done.maxima + padded;
    memset(done.values, 0, padded * done.stride * sizeof(float));
    memset(done.sums, 0, padded * sizeof(float));
    for (int64_t row = 0; row < padded; row++) done.maxima[row] = -INFINITY;
    if (task->few) attend_few(layer, task, keys, &done, packed);
    else attend_tile(layer, task, keys, &done, packed);
    finish_unit(layer, task, split, &done);
}

void attention_work(Plan *plan, const Problem *problem, atomic_llong *next, int thread) {
    const Layer layer = {problem, plan->fold, plan->value_stride, &plan->stray};
    float *results = plan->scratch + thread * (plan->result_floats + plan->packed_floats);
    for (;;) {
        int64_t i = atomic_fetch_add(next, 1);
        if (i >= plan->num_units) return;
        KeyUnit unit = plan->units[i];
        attend_unit(&layer, plan->tasks + unit.task, unit.split, results, results + plan->result_floats);
    }
}

/* 0; 1 if a sequence reaches outside its tokens, its block table or the pool; 2 if there is no memory. */
EXPORT int paged_attention(const Problem *p) {
    Plan plan;
    atomic_llong next = 0;
    int64_t bytes = attention_space(p, p->threads);
    if (bytes < 0) return 1;
    void *space = aligned_alloc(64, (size_t)bytes);
    if (!space) return 2;
    attention_plan(&plan, p, p->threads, space);
#ifdef _OPENMP
    if (p->threads > 1 && plan.num_units > 1 && plan.products >= PARALLEL_WORK) {
#pragma omp parallel num_threads(p->threads)
        attention_work(&plan, p, &next, omp_get_thread_num());
    } else
#endif
        attention_work(&plan, p, &next, 0);
    free(space);
    return attention_stray(&plan);
}
