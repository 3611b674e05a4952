/* A whole forward pass in one call: what it is told, and what its parts share.

   A program is a model's constants: matrices, norms and how they are wired. A call is one pass of packed tokens: ids in,
   K/V into the pool, logits of the wanted rows out. Rows that are few are normed and rounded by every thread for
   itself, into memory of its own, which is cheaper than to meet; many are shared out. Either way a row's numbers are
   made by the same operations in the same order, so they do not depend on the rows beside it or on the threads. */
#pragma once

#include "attention.h"
#include "gemm.h"
#include "team.h"

#define STEP_FEW 8             /* rows up to which every thread prepares all of them */
#define STEP_CHUNK_BYTES (4 << 20) /* of the widest intermediate result of a chunk of rows */
#define STEP_PLANS 8           /* kinds of attention layers that differ in shape or window */

enum { STEP_NO_NORM, STEP_RMS, STEP_LAYER_NORM };
enum { STEP_NO_TABLE, STEP_FP32, STEP_FP16, STEP_BF16, STEP_PACKED };
enum { STEP_PRODUCTS, STEP_ATTENTION, STEP_NORMS, STEP_ROPE, STEP_GATE, STEP_HEAD, STEP_WAITING, STEP_OTHER, STEP_KINDS };
enum { STEP_DONE, STEP_OUT_OF_BOUNDS, STEP_NO_MEMORY, STEP_BAD_ID, STEP_BAD_POSITION, STEP_BAD_SLOT, STEP_BAD_ROW };

/* All structs are mirrored by native_step. `weight` and `bias` of layer norms may be null. */
typedef struct {
    const float *weight, *bias;
    float eps, offset;
    int64_t kind;
} StepNorm;

typedef struct {
    const Matrix *qkv, *out, *up, *down; /* up: gate and up together, or what a plain MLP begins with */
    const float *query_norm, *key_norm, *sinks;
    StepNorm pre_attention, post_attention, pre_mlp, post_mlp;
    int64_t heads, kv_heads, key_dim, value_dim, query_norm_width, key_norm_width, window, middle;
    float head_eps, head_offset, attention_scale, softcap, scale;
    int32_t rope, interleaved, activation, gated, parallel, plan, mode; /* rope -1: none; mode -1: the batch's */
} StepLayer;

typedef struct {
    const float *cos, *sin; /* [length][width], looked up by position; null: given with each call, by token */
    int64_t length, width;
} StepRope;

typedef struct {
    const StepLayer *layers;
    const StepRope *ropes;
    const Matrix *head; /* null: calls ask for hidden states alone */
    const void *embedding; /* [vocabulary][width], or a Matrix of these rows */
    StepNorm last;
    int64_t num_layers, num_ropes, num_plans, width, vocabulary;
    float embedding_scale, logits_scale, logits_softcap; /* a soft cap of 0: none */
    int32_t embedding_type; /* STEP_NO_TABLE: embedded rows are given with each call */
} StepProgram;

typedef struct {
    void *pool;
    int64_t row, slots;
    int64_t type; /* as Problem.pool_type */
} StepPool;

typedef struct {
    const StepProgram *program;
    const StepPool *pools; /* of each layer */
    const Problem *batch;  /* its fields of the batch; the rest is the layers' */
    const int64_t *ids, *positions, *slots, *rows; /* positions as the rotary embedding takes them */
    const float *embedded;      /* [tokens][width], or null */
    const float *const *tables; /* of each rope source without a table: cos and sin [tokens][width]; or null */
    float *const *taps;         /* of each layer: [tokens][width] or null; or null */
    float *logits, *hidden;     /* [rows][outputs of the head] and [rows][width], one or both */
    int64_t num_rows, threads;
} StepCall;

/* What lasts from call to call: memory, and where the first thread's time went. */
typedef struct {
    char *room;
    int64_t bytes;
    uint64_t ticks[STEP_KINDS], all_ticks, nanoseconds, calls;
} StepState;
