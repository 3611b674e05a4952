/* A whole forward pass: what one thread does from the token ids to the logits, in step with its team. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "rope.h"
#include "step.h"
#include "step_rows.h"
#ifdef _OPENMP
#include <omp.h>
#endif

/* Memory for rows on their way through the pass: one for all threads, and a small one for each thread. */
typedef struct {
    float *stream, *picked; /* residual stream, of all tokens and of the wanted rows */
    float *in;              /* [rows][widest]: what the next product reads */
    void *space;            /* its prepared form */
    float *spare;           /* [width] */
} StepRows;

typedef struct {
    const StepCall *call;
    const StepProgram *program;
    Team team;
    int64_t tokens, rows, chunk, widest, out_row; /* out_row: of attention's results */
    StepRows all, *own;
    float *qkv, *query, *attended, *update, *other, *up, *gated;
    float **tables; /* of each rope source: cos and sin, by token */
    Plan plans[STEP_PLANS];
    atomic_llong next[TEAM_SETS];
    int whole; /* the last layer's hidden states are wanted of all tokens */
} StepRun;

/* What is still to be added to the stream. */
typedef struct {
    const float *update, *other; /* null: nothing */
    const StepNorm *norm;
    float scale;
    float *tap;
} StepPending;

/* One thread. */
typedef struct {
    StepRun *run;
    Member self;
    uint64_t since, ticks[STEP_KINDS];
    StepPending pending;
    const float *stream; /* of the rows as they are now */
} StepThread;

/* The input of a product: floats, and their prepared form. */
typedef struct {
    const float *x;
    int64_t x_row;
    void *space;
} StepInput;

typedef struct {
    int64_t begin, end;
} StepPart;

/* Time since the last mark was spent on `kind`. */
INLINE void step_mark(StepThread *t, int kind) {
    uint64_t now = __rdtsc();
    t->ticks[kind] += now - t->since;
    t->since = now;
}

static void step_wait(StepThread *t) {
    team_wait(&t->self);
    step_mark(t, STEP_WAITING);
}

/* Whether every thread prepares all of so many rows for itself. */
INLINE int step_few(int64_t rows) { return rows <= STEP_FEW; }
INLINE StepRows *step_rows_of(StepThread *t, int64_t rows) {
    return step_few(rows) ? t->run->own + t->self.thread : &t->run->all;
}

/* This thread's part of `count` rows from `first` on, of `rows` in all. */
INLINE StepPart step_part(const StepThread *t, int64_t rows, int64_t first, int64_t count) {
    if (step_few(rows)) return (StepPart){first, first + count};
    int64_t thread = t->self.thread, size = t->self.size;
    return (StepPart){first + count * thread / size, first + count * (thread + 1) / size};
}

static void step_product(StepThread *t, const Matrix *matrix, StepInput in, int64_t rows, float *out, int64_t out_row,
                         int kind) {
    int64_t panels = gemm_panels(matrix), begin, end;
    Turn turn = team_turn(&t->self, panels, max64(1, min64(4, panels / (8 * t->self.size))));
    while (team_take(&turn, &begin, &end))
        gemm_panels_run(matrix, in.x, in.x_row, in.space, rows, begin, end, out, out_row);
    step_mark(t, kind);
    step_wait(t);
}

/* The stream's row after what is pending was added; `from` and `to` may be one row. */
static void step_settle_row(StepThread *t, const StepPending *pending, int64_t row, const float *from, float *to,
                            float *spare) {
    int64_t width = t->run->program->width, bytes = width * (int64_t)sizeof(float);
    if (!pending->update) {
        if (to != from) memcpy(to, from, bytes);
        return;
    }
    const float *update = pending->update + row * width;
    if (pending->other) {
        step_add(spare, update, pending->other + row * width, 1.0f, width);
        update = spare;
    }
    if (pending->norm && pending->norm->kind) {
        step_norm(spare, update, pending->norm, width);
        update = spare;
    }
    step_add(to, from, update, pending->scale, width);
    if (pending->tap && (!step_few(t->run->tokens) || t->self.thread == 0)) memcpy(pending->tap + row * width, to, bytes);
}

/* Rows [first, first + count) of `rows`: add what is pending, norm, and prepare them for `matrix` (or none).
   `pick` (or null) names the row of the stream as it is now that each becomes. */
static StepInput step_ready(StepThread *t, const StepNorm *norm, const Matrix *matrix, int64_t rows, int64_t first,
                            int64_t count, const int64_t *pick) {
    int64_t width = t->run->program->width, widest = t->run->widest;
    StepRows *mine = step_rows_of(t, rows);
    float *to = pick || t->stream == mine->picked ? mine->picked : mine->stream;
    float *spare = t->run->own[t->self.thread].spare;
    StepPart part = step_part(t, rows, first, count);
    StepInput in = {mine->in, widest, mine->space};
    for (int64_t row = part.begin; row < part.end; row++) {
        float *stream = to + row * width;
        step_settle_row(t, &t->pending, row, t->stream + (pick ? pick[row] : row) * width, stream, spare);
        if (norm->kind) step_norm(mine->in + (row - first) * widest, stream, norm, width);
    }
    if (!norm->kind) in = (StepInput){to + first * width, width, mine->space};
    if (matrix) gemm_prepare(matrix, in.x, in.x_row, part.begin - first, part.end - first, in.space);
    step_mark(t, STEP_NORMS);
    if (!step_few(rows)) step_wait(t);
    return in;
}

/* `count` rows of `rows`, from `first` on, that others made, prepared for `matrix`. x is the first of them, or with
   `pick` row 0 of those that it chooses from. */
static StepInput step_taken(StepThread *t, const float *x, int64_t x_row, const Matrix *matrix, int64_t rows,
                            int64_t first, int64_t count, const int64_t *pick) {
    StepRows *mine = step_rows_of(t, rows);
    StepPart part = step_part(t, rows, 0, count);
    StepInput in = {x, x_row, mine->space};
    if (pick) {
        in = (StepInput){mine->in, t->run->widest, mine->space};
        for (int64_t row = part.begin; row < part.end; row++)
            memcpy(mine->in + row * in.x_row, x + pick[first + row] * x_row, x_row * sizeof(float));
    }
    gemm_prepare(matrix, in.x, in.x_row, part.begin, part.end, in.space);
    step_mark(t, STEP_NORMS);
    if (!step_few(rows) && (pick || gemm_space(matrix, 1))) step_wait(t);
    return in;
}

static void step_gate_part(const StepThread *t, const StepLayer *layer, int64_t rows, int64_t begin, int64_t end) {
    const StepRun *run = t->run;
    int64_t up_row = layer->gated ? 2 * layer->middle : layer->middle;
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = run->up + row * up_row + begin, *up = layer->gated ? gate + layer->middle : 0;
        step_activate(run->gated + row * layer->middle + begin, gate, up, end - begin, layer->activation);
    }
}

/* The MLP's first product and its activation. Where panels and halves agree, who made both halves of a part gates it. */
static void step_up(StepThread *t, const StepLayer *layer, StepInput in, int64_t rows) {
    const Matrix *matrix = layer->up;
    StepRun *run = t->run;
    int64_t width = gemm_panel_outputs(matrix), middle = layer->middle, begin, end;
    int64_t row = layer->gated ? 2 * middle : middle, units = (middle + width - 1) / width;
    if (layer->gated && middle % width) {
        step_product(t, matrix, in, rows, run->up, row, STEP_PRODUCTS);
        step_gate_part(t, layer, rows, middle * t->self.thread / t->self.size,
                       middle * (t->self.thread + 1) / t->self.size);
    } else {
        Turn turn = team_turn(&t->self, units, max64(1, min64(2, units / (8 * t->self.size))));
        while (team_take(&turn, &begin, &end)) {
            gemm_panels_run(matrix, in.x, in.x_row, in.space, rows, begin, end, run->up, row);
            if (layer->gated)
                gemm_panels_run(matrix, in.x, in.x_row, in.space, rows, begin + units, end + units, run->up, row);
            step_mark(t, STEP_PRODUCTS);
            step_gate_part(t, layer, rows, begin * width, min64(end * width, middle));
            step_mark(t, STEP_GATE);
        }
    }
    step_mark(t, STEP_GATE);
    step_wait(t);
}

/* Queries and the pool's entries of rows [first, first + count) from their products. */
static void step_rotate(StepThread *t, const StepLayer *layer, const StepPool *pool, int64_t first, int64_t count) {
    const StepRun *run = t->run;
    int64_t query_row = layer->heads * layer->key_dim, thread = t->self.thread, size = t->self.size;
    RopeWrite task = {
        .qkv = run->qkv, .query_norm = layer->query_norm, .key_norm = layer->key_norm,
        .slots = run->call->slots + first, .query = run->query + first * query_row, .pool = pool->pool,
        .qkv_row = query_row + layer->kv_heads * (layer->key_dim + layer->value_dim), .pool_row = pool->row,
        .rows = count, .num_slots = pool->slots, .heads = layer->heads, .kv_heads = layer->kv_heads,
        .key_dim = layer->key_dim, .value_dim = layer->value_dim, .query_norm_width = layer->query_norm_width,
        .key_norm_width = layer->key_norm_width, .eps = layer->head_eps, .offset = layer->head_offset,
        .interleaved = layer->interleaved, .threads = 1, .pool_type = (int32_t)pool->type,
    };
    if (layer->rope >= 0) {
        task.rotary = task.cos_row = task.sin_row = run->program->ropes[layer->rope].width;
        task.cos = run->tables[2 * layer->rope] + first * task.rotary;
        task.sin = run->tables[2 * layer->rope + 1] + first * task.rotary;
    }
    rope_write_rows(&task, count * thread / size, count * (thread + 1) / size);
    step_mark(t, STEP_ROPE);
}

/* What attention is told of a layer, but for what is in the workspace. */
static Problem step_problem(const StepCall *call, int64_t index) {
    const StepLayer *layer = call->program->layers + index;
    const StepPool *pool = call->pools + index;
    Problem p = *call->batch;
    if (layer->mode >= 0) p.mode = layer->mode;
    p.heads = layer->heads, p.kv_heads = layer->kv_heads, p.key_dim = layer->key_dim, p.value_dim = layer->value_dim;
    p.window = layer->window, p.scale = layer->attention_scale, p.softcap = layer->softcap, p.sinks = layer->sinks;
    p.query_head = layer->key_dim, p.query_row = layer->heads * layer->key_dim;
    p.pool = pool->pool, p.pool_row = pool->row, p.num_slots = pool->slots, p.pool_type = (int32_t)pool->type;
    return p;
}

static void step_attend(StepThread *t, int64_t index) {
    StepRun *run = t->run;
    Problem problem = step_problem(run->call, index);
    problem.query = run->query;
    problem.out = run->attended;
    if (t->self.thread == 0) /* nobody looks at this one since the layer before the last, or until the next one */
        atomic_store_explicit(&run->next[(index + 1) % TEAM_SETS], 0, memory_order_relaxed);
    Plan *plan = run->plans + run->program->layers[index].plan;
    attention_work(plan, &problem, &run->next[index % TEAM_SETS], t->self.thread);
    step_mark(t, STEP_ATTENTION);
    step_wait(t);
}

/* From attention's results to what is pending after the layer, for rows [first, first + count) of `rows`. */
static void step_rest(StepThread *t, const StepLayer *layer, int64_t rows, int64_t first, int64_t count,
                      const int64_t *pick) {
    const StepRun *run = t->run;
    int64_t width = run->program->width;
    float *update = run->update + first * width;
    int64_t attended_row = layer->heads * layer->value_dim;
    const float *attended = run->attended + (pick ? 0 : first * attended_row);
    StepInput in = step_taken(t, attended, attended_row, layer->out, rows, first, count, pick);
    step_product(t, layer->out, in, count, update, width, STEP_PRODUCTS);
    t->pending = (StepPending){run->update, 0, &layer->post_attention, layer->scale, 0};
    if (layer->parallel) t->pending = (StepPending){0};
    in = step_ready(t, &layer->pre_mlp, layer->up, rows, first, count, pick);
    step_up(t, layer, in, count);
    in = step_taken(t, run->gated, layer->middle, layer->down, rows, first, count, 0);
    step_product(t, layer->down, in, count, layer->parallel ? run->other + first * width : update, width,
                 STEP_PRODUCTS);
}

static void step_layer(StepThread *t, int64_t index) {
    StepRun *run = t->run;
    const StepLayer *layer = run->program->layers + index;
    const StepPool *pool = run->call->pools + index;
    int64_t tokens = run->tokens, qkv_row = layer->qkv->outputs;
    for (int64_t first = 0; first < tokens; first += run->chunk) {
        int64_t count = min64(run->chunk, tokens - first);
        StepInput in = step_ready(t, &layer->pre_attention, layer->qkv, tokens, first, count, 0);
        step_product(t, layer->qkv, in, count, run->qkv, qkv_row, STEP_PRODUCTS);
        step_rotate(t, layer, pool, first, count);
    }
    t->stream = step_rows_of(t, tokens)->stream;
    step_wait(t);
    step_attend(t, index);
    int last = index == run->program->num_layers - 1 && !run->whole;
    const int64_t *pick = last ? run->call->rows : 0;
    int64_t rows = last ? run->rows : tokens;
    for (int64_t first = 0; first < rows; first += run->chunk)
        step_rest(t, layer, rows, first, min64(run->chunk, rows - first), pick);
    if (last) t->stream = step_rows_of(t, rows)->picked;
    t->pending = (StepPending){run->update, layer->parallel ? run->other : 0, &layer->post_mlp, layer->scale,
                               run->call->taps ? run->call->taps[index] : 0};
    if (layer->parallel) t->pending.norm = 0;
}

static void step_begin(StepThread *t) {
    const StepRun *run = t->run;
    const StepCall *call = run->call;
    int64_t width = run->program->width;
    StepRows *mine = step_rows_of(t, run->tokens);
    StepPart part = step_part(t, run->tokens, 0, run->tokens);
    for (int64_t row = part.begin; row < part.end; row++) {
        if (call->embedded) memcpy(mine->stream + row * width, call->embedded + row * width, width * sizeof(float));
        else step_embed(mine->stream + row * width, run->program, call->ids[row]);
    }
    t->stream = mine->stream;
    int64_t thread = t->self.thread, size = t->self.size;
    for (int64_t rope = 0; rope < run->program->num_ropes; rope++) {
        const StepRope *source = run->program->ropes + rope;
        if (!source->length) continue; /* given by token */
        for (int64_t row = run->tokens * thread / size; row < run->tokens * (thread + 1) / size; row++) {
            int64_t at = call->positions[row] * source->width, bytes = source->width * (int64_t)sizeof(float);
            memcpy(run->tables[2 * rope] + row * source->width, source->cos + at, bytes);
            memcpy(run->tables[2 * rope + 1] + row * source->width, source->sin + at, bytes);
        }
    }
    step_mark(t, STEP_OTHER);
    step_wait(t);
}

/* Scale and soft cap of finished logits. */
static void step_finish(StepThread *t, float *logits, int64_t count, int64_t row) {
    float scale = t->run->program->logits_scale, cap = t->run->program->logits_softcap;
    if (scale == 1.0f && cap == 0.0f) return;
    int64_t begin = count * row * t->self.thread / t->self.size, end = count * row * (t->self.thread + 1) / t->self.size;
    for (int64_t i = begin; i < end; i += W) {
        lanes m = v_first(end - i);
        vec x = v_mul(v_load_at(logits + i, m), v_set(scale));
        if (cap != 0.0f) x = v_mul(v_tanh(v_mul(x, v_set(1.0f / cap))), v_set(cap));
        v_store_at(logits + i, x, m);
    }
    step_mark(t, STEP_HEAD);
}

/* Final norm and head of the wanted rows. */
static void step_end(StepThread *t) {
    StepRun *run = t->run;
    const StepCall *call = run->call;
    const Matrix *head = call->logits ? run->program->head : 0;
    int64_t width = run->program->width, rows = run->rows;
    const int64_t *pick = 0;
    if (run->whole) { /* add and tap all of them first */
        static const StepNorm none = {0};
        for (int64_t first = 0; first < run->tokens; first += run->chunk)
            step_ready(t, &none, 0, run->tokens, first, min64(run->chunk, run->tokens - first), 0);
        t->stream = step_rows_of(t, run->tokens)->stream;
        t->pending = (StepPending){0};
        pick = call->rows;
    }
    for (int64_t first = 0; first < rows; first += run->chunk) {
        int64_t count = min64(run->chunk, rows - first);
        StepInput in = step_ready(t, &run->program->last, head, rows, first, count, pick);
        StepPart part = step_part(t, rows, first, count);
        if (call->hidden && (!step_few(rows) || t->self.thread == 0))
            for (int64_t row = part.begin; row < part.end; row++)
                memcpy(call->hidden + row * width, in.x + (row - first) * in.x_row, width * sizeof(float));
        if (head) {
            int64_t out_row = head->outputs;
            float *logits = call->logits + first * out_row;
            step_product(t, head, in, count, logits, out_row, STEP_HEAD);
            step_finish(t, logits, count, out_row);
        }
    }
}

static void step_thread(StepRun *run, StepState *state, int thread, int size) {
    StepThread t = {.run = run, .self = {&run->team, thread, size, 0}, .since = __rdtsc()};
    step_begin(&t);
    for (int64_t layer = 0; layer < run->program->num_layers; layer++) step_layer(&t, layer);
    step_end(&t);
    if (thread == 0)
        for (int kind = 0; kind < STEP_KINDS; kind++) state->ticks[kind] += t.ticks[kind];
}

/* ---- what one thread does before and after -------------------------------------------------------------- */

/* The next `count` floats of a block of memory; with `at` null they are only counted. */
static void *step_room(char *room, int64_t *used, int64_t bytes) {
    char *found = room ? room + *used : 0;
    *used += round_up(bytes, TEAM_LINE);
    return found;
}

static float *step_floats(char *room, int64_t *used, int64_t count) {
    return step_room(room, used, count * (int64_t)sizeof(float));
}

/* Widths of the program's widest rows, in floats, and the largest prepared form of a row, in bytes. */
typedef struct {
    int64_t widest, qkv, query, attended, up, middle, space;
} StepSizes;

static StepSizes step_sizes(const StepProgram *p, int64_t rows) {
    StepSizes s = {.widest = p->width, .space = p->head ? gemm_space(p->head, rows) : 0};
    for (const StepLayer *l = p->layers; l < p->layers + p->num_layers; l++) {
        const Matrix *matrices[] = {l->qkv, l->out, l->up, l->down};
        for (int i = 0; i < 4; i++) s.space = max64(s.space, gemm_space(matrices[i], rows));
        s.qkv = max64(s.qkv, l->qkv->outputs);
        s.query = max64(s.query, l->heads * l->key_dim);
        s.attended = max64(s.attended, l->heads * l->value_dim);
        s.up = max64(s.up, l->up->outputs);
        s.middle = max64(s.middle, l->middle);
    }
    s.widest = max64(s.widest, s.attended);
    return s;
}

/* Rows of a chunk: as many as keep its widest intermediate result in the cache, all chunks about equal. */
static int64_t step_chunk(int64_t rows, const StepSizes *sizes) {
    int64_t most = max64(64, min64(512, STEP_CHUNK_BYTES / (4 * max64(1, sizes->up)))), chunks = (rows + most - 1) / most;
    return max64((rows + max64(chunks, 1) - 1) / max64(chunks, 1), STEP_FEW);
}

static StepRows step_rows_room(char *room, int64_t *used, int64_t tokens, int64_t rows, int64_t chunk,
                               const StepProgram *program) {
    StepSizes sizes = step_sizes(program, chunk);
    return (StepRows){
        .stream = step_floats(room, used, tokens * program->width),
        .picked = step_floats(room, used, rows * program->width),
        .in = step_floats(room, used, chunk * sizes.widest),
        .space = step_room(room, used, sizes.space),
        .spare = step_floats(room, used, program->width),
    };
}

/* Give every part of a run its memory; with `room` null, count the bytes. */
static int64_t step_lay_out(StepRun *run, char *room, int64_t threads, const int64_t *attention) {
    const StepProgram *program = run->program;
    int64_t used = 0, tokens = run->tokens, rows = run->rows, most = max64(tokens, rows);
    StepSizes sizes = step_sizes(program, 1);
    run->chunk = step_chunk(most, &sizes);
    run->widest = sizes.widest;
    int64_t chunk = run->chunk;
    void *ranges = step_room(room, &used, team_bytes((int)threads));
    run->own = step_room(room, &used, threads * (int64_t)sizeof(StepRows));
    run->tables = step_room(room, &used, 2 * program->num_ropes * (int64_t)sizeof(float *));
    for (int64_t i = 0; i < threads; i++) {
        StepRows own = step_rows_room(room, &used, STEP_FEW, STEP_FEW, STEP_FEW, program);
        if (room) run->own[i] = own;
    }
    run->all = step_rows_room(room, &used, tokens, rows, chunk, program);
    run->qkv = step_floats(room, &used, chunk * sizes.qkv);
    run->query = step_floats(room, &used, tokens * sizes.query);
    run->attended = step_floats(room, &used, tokens * sizes.attended);
    run->update = step_floats(room, &used, most * program->width);
    run->other = step_floats(room, &used, most * program->width);
    run->up = step_floats(room, &used, chunk * sizes.up);
    run->gated = step_floats(room, &used, chunk * sizes.middle);
    for (int64_t i = 0; i < 2 * program->num_ropes; i++) {
        const StepRope *rope = program->ropes + i / 2;
        float *table = rope->length ? step_floats(room, &used, tokens * rope->width) : (float *)run->call->tables[i];
        if (room) run->tables[i] = table;
    }
    if (room) team_reset(&run->team, (int)threads, ranges);
    for (int64_t plan = 0; plan < program->num_plans; plan++) {
        char *space = step_room(room, &used, attention[plan]);
        for (int64_t layer = 0; room && layer < program->num_layers; layer++)
            if (program->layers[layer].plan == plan) {
                Problem problem = step_problem(run->call, layer);
                attention_plan(run->plans + plan, &problem, (int)threads, space);
                break;
            }
    }
    return used;
}

/* Whether every number that memory is addressed by is in its range. */
static int step_check(const StepCall *call) {
    const StepProgram *program = call->program;
    const Problem *batch = call->batch;
    int64_t slots = INT64_MAX, length = INT64_MAX;
    for (int64_t i = 0; i < program->num_layers; i++) slots = min64(slots, call->pools[i].slots);
    for (int64_t i = 0; i < program->num_ropes; i++)
        if (program->ropes[i].length) length = min64(length, program->ropes[i].length);
    for (int64_t i = 0; i < batch->num_tokens; i++) {
        if (!call->embedded && (call->ids[i] < 0 || call->ids[i] >= program->vocabulary)) return STEP_BAD_ID;
        if (call->positions[i] < 0 || call->positions[i] >= length) return STEP_BAD_POSITION;
        if (call->slots[i] < 0 || call->slots[i] >= slots) return STEP_BAD_SLOT;
    }
    for (int64_t i = 0; i < call->num_rows; i++)
        if (call->rows[i] < 0 || call->rows[i] >= batch->num_tokens) return STEP_BAD_ROW;
    return STEP_DONE;
}

/* Bytes that each plan of attention takes; 0 if a sequence reaches outside the batch. */
static int step_plan_space(const StepCall *call, int64_t *space) {
    const StepProgram *program = call->program;
    for (int64_t i = 0; i < program->num_plans; i++) space[i] = 0;
    for (int64_t i = 0; i < program->num_layers; i++) {
        int64_t *own = space + program->layers[i].plan;
        if (*own) continue;
        Problem problem = step_problem(call, i);
        *own = attention_space(&problem, (int)call->threads);
        if (*own < 0) return 0;
    }
    return 1;
}

static int step_grow(StepState *state, int64_t bytes) {
    if (bytes <= state->bytes) return 1;
    free(state->room);
    bytes = round_up(bytes + bytes / 4, 4096);
    state->room = aligned_alloc(4096, bytes);
    state->bytes = state->room ? bytes : 0;
    return state->room != 0;
}

static uint64_t step_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void step_all(StepRun *run, StepState *state) {
#ifdef _OPENMP
    int threads = (int)run->call->threads;
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        step_thread(run, state, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    step_thread(run, state, 0, 1);
}

/* One pass; see the enum of step.h for what it returns. A state serves one call at a time. */
EXPORT int step_run(StepState *state, const StepCall *call) {
    uint64_t ticks = __rdtsc(), nanoseconds = step_clock();
    const StepProgram *program = call->program;
    StepRun run = {.call = call, .program = program, .tokens = call->batch->num_tokens, .rows = call->num_rows};
    int64_t attention[STEP_PLANS];
    int failed = step_check(call);
    if (failed) return failed;
    if (!step_plan_space(call, attention)) return STEP_OUT_OF_BOUNDS;
    run.whole = call->taps && call->taps[program->num_layers - 1];
    if (!step_grow(state, step_lay_out(&run, 0, call->threads, attention))) return STEP_NO_MEMORY;
    step_lay_out(&run, state->room, call->threads, attention);
    step_all(&run, state);
    state->calls++;
    state->all_ticks += __rdtsc() - ticks;
    state->nanoseconds += step_clock() - nanoseconds;
    for (int64_t plan = 0; plan < program->num_plans; plan++)
        if (attention_stray(run.plans + plan)) return STEP_OUT_OF_BOUNDS;
    return STEP_DONE;
}

EXPORT void *step_open(void) { return calloc(1, sizeof(StepState)); }

EXPORT void step_close(StepState *state) {
    free(state->room);
    free(state);
}
