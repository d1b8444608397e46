/* The gradient with respect to the input of a linear layer: output = grad . weight in float32, for
 * few rows and weights of float32, bfloat16 or float16. The caller is linear_grad.py.
 *
 * The weight is read once, four rows at a time, and widened in registers. What the rows of grad make
 * of it is summed in a tile that stays in the L1 cache. out_features are divided into chunks whose
 * sums are added at the end. The chunks follow from the shape of the weight alone and every sum
 * goes over out_features in ascending order, so a row's result depends on neither the other rows
 * nor the number of threads, to the last bit.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu_vectors.h"

#if defined(__x86_64__)
#pragma GCC target("f16c")
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum {
  BLOCK = 16,        /* columns whose weights are in registers together */
  STEP = 4,          /* rows of the weight, as many */
  ROWS = 48,         /* rows of grad that share a tile, at most */
  TILE_FLOATS = 6144, /* of the L1 cache, for sums */
  MIN_CHUNK = 256, MIN_CHUNKS = 4, MAX_CHUNKS = 64,
};

struct call {
  const float *grad;  /* [num_rows, out_features] */
  const void *weight; /* [out_features, in_features] */
  float *output;      /* [num_rows, in_features] */
  int64_t grad_stride, weight_stride, output_stride; /* elements between two rows */
  int64_t num_rows, out_features, in_features;
  int32_t dtype;      /* of the weight */
};

/* How a call is cut up. Sums are [chunks, row blocks, tiles, rows of the block, width]. */
struct plan {
  int64_t chunk, chunks;     /* out_features of a chunk */
  int64_t rows, row_blocks;  /* rows of a block */
  int64_t width, tiles;      /* columns of a tile, a multiple of BLOCK */
};

static int64_t parts(int64_t total, int64_t part) { return (total + part - 1) / part; }
static int64_t round_up(int64_t n, int64_t multiple) { return parts(n, multiple) * multiple; }
static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

static struct plan make_plan(const struct call *call) {
  struct plan plan;
  int64_t chunks = parts(call->out_features, MIN_CHUNK);
  chunks = chunks < MIN_CHUNKS ? MIN_CHUNKS : lesser(chunks, MAX_CHUNKS);
  plan.chunk = round_up(parts(call->out_features, chunks), STEP);
  plan.chunks = parts(call->out_features, plan.chunk);
  plan.rows = parts(call->num_rows, parts(call->num_rows, ROWS));
  plan.row_blocks = parts(call->num_rows, plan.rows);
  plan.width = lesser(TILE_FLOATS / plan.rows / BLOCK * BLOCK, round_up(call->in_features, BLOCK));
  plan.tiles = parts(call->in_features, plan.width);
  return plan;
}

typedef uint32_t u8u __attribute__((vector_size(32), aligned(2)));
#if !defined(__x86_64__)
typedef _Float16 f16u __attribute__((vector_size(16), aligned(2)));
#endif

/* BLOCK weights as float32; those of bfloat16 with the even columns first, see `column`. */
INLINE void widen(const void *weight, int dtype, v8 *out) {
  if (dtype == BFLOAT16) {
    u8 pairs = *(const u8u *)weight;
    out[0] = (v8)(pairs << 16);
    out[1] = (v8)(pairs & 0xffff0000u);
    return;
  }
  for (int half = 0; half < 2; ++half) {
    if (dtype == FLOAT32) out[half] = *(const v8u *)((const float *)weight + 8 * half);
#if defined(__x86_64__)
    else out[half] = (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)weight + half));
#else
    else out[half] = __builtin_convertvector(((const f16u *)weight)[half], v8);
#endif
  }
}

/* Where in a block the sum of its column `c` is. */
INLINE int column(int c, int dtype) { return dtype == BFLOAT16 ? c / 2 + c % 2 * 8 : c; }

/* sums += grad . weight for one block of `steps` rows of the weight; grad is [rows, STEP]. */
INLINE void add_block(int steps, int64_t rows, const float *grad, const char *weight,
                      int64_t stride_bytes, float *sums, int64_t width, int dtype) {
  v8 w[STEP][2];
  for (int s = 0; s < steps; ++s) widen(weight + s * stride_bytes, dtype, w[s]);
  for (int64_t r = 0; r < rows; ++r) {
    float *sum = sums + r * width;
    v8 low = *(v8 *)sum, high = *(v8 *)(sum + 8);
    for (int s = 0; s < steps; ++s) {
      v8 factor = splat(grad[r * STEP + s]);
      low += factor * w[s][0];
      high += factor * w[s][1];
    }
    *(v8 *)sum = low;
    *(v8 *)(sum + 8) = high;
  }
}

/* The same for all blocks of a tile. */
INLINE void add_step(int steps, int64_t rows, const float *grad, const char *weight,
                     int64_t stride_bytes, int64_t columns, float *sums, int64_t width, int dtype) {
  int64_t size = dtype == FLOAT32 ? sizeof(float) : sizeof(uint16_t);
  int64_t c = 0;
  for (; c + BLOCK <= columns; c += BLOCK) {
    /* The next step's: rows of a tile are too short for the hardware to see ahead. */
    for (int s = 0; s < steps; ++s)
      __builtin_prefetch(weight + (s + STEP) * stride_bytes + c * size);
    add_block(steps, rows, grad, weight + c * size, stride_bytes, sums + c, width, dtype);
  }
  if (c == columns) return;
  char rest[STEP * BLOCK * sizeof(float)] = {0};
  for (int s = 0; s < steps; ++s)
    memcpy(rest + s * BLOCK * size, weight + s * stride_bytes + c * size, (columns - c) * size);
  add_block(steps, rows, grad, rest, BLOCK * size, sums + c, width, dtype);
}

INLINE void run_tile(const struct call *call, int64_t first_row, int64_t rows, int64_t first,
                     int64_t last, int64_t first_column, float *sums, int64_t width, int dtype) {
  int64_t size = dtype == FLOAT32 ? sizeof(float) : sizeof(uint16_t);
  int64_t stride_bytes = call->weight_stride * size;
  int64_t columns = lesser(width, call->in_features - first_column);
  const char *weight = (const char *)call->weight + first_column * size;
  float grad[ROWS * STEP];
  memset(sums, 0, rows * width * sizeof(float));
  for (int64_t o = first; o < last; o += STEP) {
    int64_t steps = lesser(STEP, last - o);
    for (int64_t r = 0; r < rows; ++r)
      for (int s = 0; s < steps; ++s)
        grad[r * STEP + s] = call->grad[(first_row + r) * call->grad_stride + o + s];
    const char *at = weight + o * stride_bytes;
    if (steps == STEP && rows == 1)
      add_step(STEP, 1, grad, at, stride_bytes, columns, sums, width, dtype);
    else if (steps == STEP)
      add_step(STEP, rows, grad, at, stride_bytes, columns, sums, width, dtype);
    else
      for (int s = 0; s < steps; ++s)
        add_step(1, rows, grad + s, at + s * stride_bytes, stride_bytes, columns, sums, width,
                 dtype);
  }
}

static void run_task(const struct call *call, const struct plan *plan, int64_t task, float *sums) {
  int64_t tile = task % plan->tiles, block = task / plan->tiles % plan->row_blocks;
  int64_t chunk = task / plan->tiles / plan->row_blocks;
  int64_t first_row = block * plan->rows, rows = lesser(plan->rows, call->num_rows - first_row);
  int64_t first = chunk * plan->chunk, last = lesser(first + plan->chunk, call->out_features);
  int64_t column = tile * plan->width;
  sums += task * plan->rows * plan->width;
  switch (call->dtype) {
    case FLOAT32:
      run_tile(call, first_row, rows, first, last, column, sums, plan->width, FLOAT32);
      break;
    case BFLOAT16:
      run_tile(call, first_row, rows, first, last, column, sums, plan->width, BFLOAT16);
      break;
    case FLOAT16:
      run_tile(call, first_row, rows, first, last, column, sums, plan->width, FLOAT16);
      break;
  }
}

/* Add the chunks of one row of one tile, into the first of them, and put the columns in order. */
static void finish(const struct call *call, const struct plan *plan, int64_t row, int64_t tile,
                   float *sums) {
  int64_t per_chunk = plan->row_blocks * plan->tiles * plan->rows * plan->width;
  sums += ((row / plan->rows * plan->tiles + tile) * plan->rows + row % plan->rows) * plan->width;
  for (int64_t chunk = 1; chunk < plan->chunks; ++chunk)
    for (int64_t c = 0; c < plan->width; c += 8)
      *(v8u *)(sums + c) += *(v8u *)(sums + chunk * per_chunk + c);
  int64_t first = tile * plan->width, columns = lesser(plan->width, call->in_features - first);
  float *output = call->output + row * call->output_stride + first;
  for (int64_t c = 0; c < columns; ++c)
    output[c] = sums[c / BLOCK * BLOCK + column(c % BLOCK, call->dtype)];
}

/* No size may be 0. Returns 0, or 1 if memory ran out (nothing is written then). */
int headway_linear_grad(const struct call *call) {
  struct plan plan = make_plan(call);
  int64_t per_chunk = plan.row_blocks * plan.tiles;
  int64_t num_sums = plan.chunks * per_chunk * plan.rows * plan.width;
  float *sums = aligned_alloc(64, num_sums * sizeof(float));
  if (!sums) return 1;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.chunks * per_chunk; ++task)
      run_task(call, &plan, task, sums);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < call->num_rows * plan.tiles; ++part)
      finish(call, &plan, part / plan.tiles, part % plan.tiles, sums);
  }
  free(sums);
  return 0;
}
