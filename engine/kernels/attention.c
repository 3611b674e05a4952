/* Planning, the loop over units of work, and the joining of splits. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define SPLIT_KEYS 256 /* shortest split */
#define MOST_SPLITS 32
#define ENOUGH_UNITS 16 /* a sequence of many rows is split until it has so many units */
#define PARALLEL_WORK 400000 /* below this, some 15 us of work, no other thread is woken */

typedef struct {
    int32_t task, split;
} Unit;

typedef struct {
    Plan plan;
    Task *tasks;
    Unit *units;
    float *scratch;
    int64_t num_tasks, num_units, partial_floats, cost;
    atomic_llong next;
} Work;

static int64_t heads_of(const Problem *p, const Task *task) { return task->head < 0 ? p->kv_heads : 1; }

/* One split's partial result: values [rows][value_dim], then maxima and sums [rows]. */
static int64_t partial_width(const Problem *p) { return p->value_dim + 2; }

static void cut(Task *task, int64_t splits) {
    int64_t span = task->keys.high - task->keys.low, step = task->head < 0 ? FEW_KEYS : TILE_KEYS;
    splits = max64(1, min64(splits, MOST_SPLITS));
    task->split_keys = max64(round_up((span + splits - 1) / splits, step), step);
    task->splits = max64(1, (span + task->split_keys - 1) / task->split_keys);
    atomic_init(&task->remaining, (int)task->splits);
}

/* The tasks of one sequence, the costliest first; with `tasks` null they are only counted. */
static int64_t plan_sequence(const Plan *plan, int64_t seq, Task *tasks) {
    const Problem *p = plan->problem;
    int64_t rows = (p->starts[seq + 1] - p->starts[seq]) * plan->fold;
    if (rows <= 0) return 0;
    int few = rows <= FEW_ROWS;
    int64_t tiles = few ? 1 : (rows + TILE_ROWS - 1) / TILE_ROWS, count = few ? 1 : tiles * p->kv_heads;
    int64_t height = few ? rows : round_up((rows + tiles - 1) / tiles, MR);
    if (!tasks) return count;
    for (int64_t i = 0; i < count; i++) {
        Task *task = tasks + i;
        int64_t tile = few ? 0 : tiles - 1 - i / p->kv_heads;
        task->seq = seq;
        task->head = few ? -1 : i % p->kv_heads;
        task->first_row = tile * height;
        task->rows = min64(height, rows - task->first_row);
        task->keys.low = row_range(plan, task, 0).low;
        task->keys.high = row_range(plan, task, task->rows - 1).high;
        int64_t span = task->keys.high - task->keys.low;
        int64_t wanted = (ENOUGH_UNITS + count - 1) / count;
        cut(task, few ? (span + SPLIT_KEYS - 1) / SPLIT_KEYS : min64(wanted, span / SPLIT_KEYS));
    }
    return count;
}

/* Rows of results, then what attend_few or attend_tile packs. */
static int64_t scratch_needed(const Plan *plan) {
    const Problem *p = plan->problem;
    int64_t few = FEW_ROWS * p->kv_heads, rows = round_up(max64(few, TILE_ROWS), MR);
    int64_t packed = (TILE_KEYS + TILE_ROWS) * p->key_dim + TILE_KEYS * plan->value_stride + MR * TILE_KEYS;
    packed = max64(packed, few * round_up(p->key_dim, W));
    return round_up(rows * (plan->value_stride + 2), 16) + round_up(packed, 16);
}

/* Normalise a row and put it where it belongs; a row that saw nothing is 0. */
static void emit(const Plan *plan, const Task *task, int64_t head, int64_t row, const float *values, float maximum,
                 float sum) {
    const Problem *p = plan->problem;
    int64_t folded = task->first_row + row;
    int64_t token = p->starts[task->seq] + folded / plan->fold, query_head = head * plan->fold + folded % plan->fold;
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
static void join(const Plan *plan, Task *task) {
    const Problem *p = plan->problem;
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
        emit(plan, task, task->head < 0 ? row / task->rows : task->head, row % task->rows, values, *maximum, *sum);
    }
}

static void finish(const Plan *plan, Task *task, int64_t split, const Gathered *done) {
    const Problem *p = plan->problem;
    int64_t rows = heads_of(p, task) * task->rows, width = p->value_dim;
    if (task->splits == 1) {
        for (int64_t row = 0; row < rows; row++)
            emit(plan, task, task->head < 0 ? row / task->rows : task->head, row % task->rows,
                 done->values + row * done->stride, done->maxima[row], done->sums[row]);
        return;
    }
    float *to = task->partials + split * rows * partial_width(p);
    for (int64_t row = 0; row < rows; row++)
        memcpy(to + row * width, done->values + row * done->stride, width * sizeof(float));
    memcpy(to + rows * width, done->maxima, rows * sizeof(float));
    memcpy(to + rows * (width + 1), done->sums, rows * sizeof(float));
    if (atomic_fetch_sub(&task->remaining, 1) == 1) join(plan, task);
}

static void run_unit(Work *work, const Unit *unit, float *scratch) {
    Plan *plan = &work->plan;
    Task *task = work->tasks + unit->task;
    int64_t rows = heads_of(plan->problem, task) * task->rows, padded = round_up(rows, MR);
    Range keys = {task->keys.low + unit->split * task->split_keys, 0};
    keys.high = min64(keys.low + task->split_keys, task->keys.high);
    Gathered done = {scratch, 0, 0, plan->value_stride};
    done.maxima = done.values + padded * done.stride;
    done.sums = done.maxima + padded;
    memset(done.values, 0, padded * done.stride * sizeof(float));
    memset(done.sums, 0, padded * sizeof(float));
    for (int64_t row = 0; row < padded; row++) done.maxima[row] = -INFINITY;
    float *rest = scratch + round_up(padded * (done.stride + 2), 16);
    if (task->head < 0) attend_few(plan, task, keys, &done, rest);
    else attend_tile(plan, task, keys, &done, rest);
    finish(plan, task, unit->split, &done);
}

static void run(Work *work, int64_t thread) {
    float *scratch = work->scratch + thread * work->plan.scratch_floats;
    for (;;) {
        int64_t i = atomic_fetch_add(&work->next, 1);
        if (i >= work->num_units) return;
        run_unit(work, work->units + i, scratch);
    }
}

/* Sizes of everything; long sequences of many rows come first, so that no thread is left with one at the end. */
static int make_tasks(Work *work) {
    const Problem *p = work->plan.problem;
    for (int64_t seq = 0; seq < p->num_seqs; seq++) work->num_tasks += plan_sequence(&work->plan, seq, 0);
    work->tasks = malloc(sizeof(Task) * (size_t)(work->num_tasks + 1));
    if (!work->tasks) return 2;
    int64_t at = 0;
    for (int few = 0; few < 2; few++)
        for (int64_t seq = 0; seq < p->num_seqs; seq++)
            if (((p->starts[seq + 1] - p->starts[seq]) * work->plan.fold <= FEW_ROWS) == few)
                at += plan_sequence(&work->plan, seq, work->tasks + at);
    for (int64_t i = 0; i < at; i++) {
        const Task *task = work->tasks + i;
        int64_t rows = heads_of(p, task) * task->rows;
        work->num_units += task->splits;
        if (task->splits > 1) work->partial_floats += task->splits * rows * partial_width(p);
        int64_t products = rows * (task->keys.high - task->keys.low) * (p->key_dim + p->value_dim);
        work->cost += task->head < 0 ? products : products / 2; /* few rows wait for memory */
    }
    return 0;
}

/* One block of memory: scratch of each thread, partial results, units. */
static void *make_room(Work *work, int threads) {
    int64_t scratch = threads * work->plan.scratch_floats, partials = round_up(work->partial_floats, 16);
    size_t bytes = sizeof(float) * (size_t)(scratch + partials) + sizeof(Unit) * (size_t)(work->num_units + 8);
    float *room = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!room) return 0;
    work->scratch = room;
    float *partial = room + scratch;
    work->units = (Unit *)(room + scratch + partials);
    Unit *unit = work->units;
    for (int64_t i = 0; i < work->num_tasks; i++) {
        Task *task = work->tasks + i;
        task->partials = partial;
        if (task->splits > 1)
            partial += task->splits * heads_of(work->plan.problem, task) * task->rows * partial_width(work->plan.problem);
        for (int32_t split = 0; split < task->splits; split++) *unit++ = (Unit){(int32_t)i, split};
    }
    return room;
}

/* Whether every sequence's queries lie in the batch, and there is a block to read at all. */
static int in_bounds(const Problem *p) {
    for (int64_t seq = 0; seq < p->num_seqs; seq++)
        if (p->starts[seq] < 0 || p->starts[seq + 1] < p->starts[seq] || p->starts[seq + 1] > p->num_tokens) return 0;
    return p->num_slots >= p->block_size || p->num_tokens == 0;
}

/* 0; 1 if a sequence reaches outside its tokens, its block table or the pool; 2 if there is no memory. */
EXPORT int paged_attention(const Problem *p) {
    Work work = {.plan = {.problem = p, .fold = p->heads / p->kv_heads}};
    if (!in_bounds(p)) return 1;
    work.plan.value_stride = round_up(p->value_dim, NR);
    work.plan.scratch_floats = scratch_needed(&work.plan);
    int failed = make_tasks(&work), threads = p->threads;
    if (failed) return failed;
    if (work.cost < PARALLEL_WORK || work.num_units < 2) threads = 1;
    void *room = make_room(&work, threads);
    if (room) {
#ifdef _OPENMP
        if (threads > 1) {
#pragma omp parallel num_threads(threads)
            run(&work, omp_get_thread_num());
        } else
#endif
            run(&work, 0);
    }
    free(room);
    free(work.tasks);
    return room ? atomic_load(&work.plan.stray) : 2;
}
