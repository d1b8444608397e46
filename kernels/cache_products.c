/* Products of float32 vectors with the keys and values of vLLM's paged CPU cache, where they are
 * stored. The caller and the meaning of every argument are in cache_products.py.
 *
 * A task is a chunk of the keys of one (row, KV head), for all vectors of all heads that share the
 * KV head: what is in the cache is fetched once. A product goes either down the rows of a stored
 * matrix (keys . x, values mixed) or along them (values . x, keys mixed). Chunks follow from the
 * block size alone, every sum goes over its terms in ascending order, and the sums of chunks are
 * added in that order, so a row's result depends on neither the other rows nor the number of
 * threads, to the last bit.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu_vectors.h"

#if defined(__x86_64__)
#pragma GCC target("f16c")
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { WITH_KEYS, WITH_VALUES, MIX_KEYS, MIX_VALUES };
enum {
  VECTORS = 3, /* vectors whose sums are in registers together, at most */
  WIDE = 4,    /* eights of columns, or rows, likewise */
  LINE = 64,   /* bytes that are fetched together */
  CHUNK = 256, /* keys of a chunk, at most, unless a block has more */
};
enum { OUT_OF_MEMORY = 1, NO_SUCH_BLOCK = 2 };

struct call {
  const void *kv_cache;   /* [num_blocks, num_kv_heads, 2 * block_size * head_size] */
  const int64_t *blocks;  /* [num_rows, blocks_per_row] */
  const int64_t *lengths; /* [num_rows] */
  const float *vectors;   /* [num_rows, num_heads, num_vectors, head_size, or num_keys to mix] */
  float *output;          /* likewise, the other of the two */
  int64_t block_stride, kv_head_stride; /* elements */
  int64_t num_blocks, num_rows, blocks_per_row, num_keys;
  int64_t num_heads, num_kv_heads, num_vectors, head_size, block_size;
  int32_t dtype, operation;
};

/* Some columns of a matrix. */
struct part { const char *data; int64_t columns; };

static int64_t parts(int64_t total, int64_t part) { return (total + part - 1) / part; }
static int64_t round_up(int64_t n, int64_t multiple) { return parts(n, multiple) * multiple; }
static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t size_of(int dtype) { return dtype == FLOAT32 ? sizeof(float) : sizeof(uint16_t); }

static int64_t chunk_keys(const struct call *call) {
  return call->block_size > CHUNK ? call->block_size : CHUNK / call->block_size * call->block_size;
}

INLINE v8 load(const char *numbers, int dtype) {
  if (dtype != FLOAT16) return load8(numbers, 0, dtype == BFLOAT16);
#if defined(__x86_64__)
  return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)numbers));
#else
  typedef _Float16 f16u __attribute__((vector_size(16), aligned(2)));
  return __builtin_convertvector(*(const f16u *)numbers, v8);
#endif
}

/* The same for less than eight, followed by zeros: what comes next may be NaN, or not there. */
INLINE v8 load_rest(const char *numbers, int64_t count, int dtype) {
  char rest[8 * sizeof(float)] = {0};
  memcpy(rest, numbers, count * size_of(dtype));
  return load(rest, dtype);
}

/* What is needed later, into the L2 cache: the hardware does not look beyond a page. */
INLINE void fetch(const char *line) { __builtin_prefetch(line, 0, 2); }

typedef float v4u __attribute__((vector_size(16), aligned(4)));

/* GCC before 12 has only the one, clang only the other. */
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (i8){__VA_ARGS__})
#endif

/* Sums of four vectors, in order. */
INLINE v4u sum4(const v8 *x) {
  v8 a = SHUFFLE(x[0], x[1], 0, 8, 1, 9, 4, 12, 5, 13) +
         SHUFFLE(x[0], x[1], 2, 10, 3, 11, 6, 14, 7, 15);
  v8 b = SHUFFLE(x[2], x[3], 0, 8, 1, 9, 4, 12, 5, 13) +
         SHUFFLE(x[2], x[3], 2, 10, 3, 11, 6, 14, 7, 15);
  v8 both = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  v4u halves[2];
  memcpy(halves, &both, sizeof both);
  return halves[0] + halves[1];
}

/* Down the rows of 8 * `wide` columns: sums (+)= factors . matrix for `vectors` <= VECTORS. Of
 * the last eight columns only `last` are there. The first `kept` sums are stored. */
INLINE void add_rows(int vectors, int wide, int64_t last, const float *factors,
                     int64_t factors_stride, const char *matrix, int64_t rows, int64_t stride,
                     float *sums, int64_t sums_stride, int64_t kept, int fresh, int64_t ahead,
                     int dtype) {
  v8 sum[VECTORS][WIDE] = {{{0}}};
  if (!fresh)
    for (int v = 0; v < vectors; ++v)
      for (int c = 0; c < wide; ++c) sum[v][c] = *(v8u *)(sums + v * sums_stride + 8 * c);
  for (int64_t r = 0; r < rows; ++r, matrix += stride) {
    if (ahead)
      for (int64_t at = 0; at < 8 * wide * size_of(dtype); at += LINE) fetch(matrix + at + ahead);
    for (int c = 0; c < wide; ++c) {
      const char *at = matrix + 8 * c * size_of(dtype);
      v8 numbers = last < 8 ? load_rest(at, last, dtype) : load(at, dtype);
      for (int v = 0; v < vectors; ++v)
        sum[v][c] += splat(factors[v * factors_stride + r]) * numbers;
    }
  }
  for (int v = 0; v < vectors; ++v)
    if (kept < 8 * wide) memcpy(sums + v * sums_stride, sum[v], kept * sizeof(float));
    else for (int c = 0; c < wide; ++c) *(v8u *)(sums + v * sums_stride + 8 * c) = sum[v][c];
}

/* The same for any number of columns and vectors. */
INLINE void down(int64_t vectors, const float *factors, int64_t factors_stride, const char *matrix,
                 int64_t rows, int64_t stride, int64_t columns, float *sums, int64_t sums_stride,
                 int64_t kept, int fresh, int64_t ahead, int dtype) {
  int64_t width;
  for (int64_t c = 0; c < columns; c += width) {
    int64_t left = columns - c;
    width = left >= 32 ? 32 : left >= 16 ? 16 : 8;
    for (int64_t v = 0; v < vectors; v += VECTORS) {
#define ADD_ROWS(count, wide, last)                                                             \
  add_rows(count, wide, last, factors + v * factors_stride, factors_stride,                     \
           matrix + c * size_of(dtype), rows, stride, sums + v * sums_stride + c, sums_stride,  \
           kept - c, fresh, v ? 0 : ahead, dtype)
#define ADD_COUNTED(wide, last)                                                                 \
  switch (vectors - v) {                                                                        \
    case 1: ADD_ROWS(1, wide, last); break;                                                     \
    case 2: ADD_ROWS(2, wide, last); break;                                                     \
    default: ADD_ROWS(3, wide, last);                                                           \
  }
      if (left >= 32) ADD_COUNTED(4, 8)
      else if (left >= 16) ADD_COUNTED(2, 8)
      else if (left >= 8) ADD_COUNTED(1, 8)
      else ADD_COUNTED(1, left)
    }
  }
}

/* Along `rows` <= 4 rows, for `vectors` <= VECTORS: sums = matrix . factors, the matrix in parts. */
INLINE void dot_rows(int vectors, const float *factors, int64_t factors_stride,
                     const struct part *matrix, int64_t num_parts, int64_t offset, int64_t rows,
                     int64_t stride, float *sums, int64_t sums_stride, int64_t ahead, int dtype) {
  v8 sum[VECTORS][WIDE] = {{{0}}};
  int64_t size = size_of(dtype), at[WIDE];
  for (int r = 0; r < WIDE; ++r) at[r] = offset + (r < rows ? r : rows - 1) * stride;
  for (int64_t p = 0; p < num_parts; ++p) {
    const char *data = matrix[p].data;
    int64_t columns = matrix[p].columns, c = 0;
    for (; c + 8 <= columns; c += 8, data += 8 * size, factors += 8) {
      if (ahead && c * size % LINE == 0)
        for (int r = 0; r < WIDE; ++r) fetch(data + at[r] + ahead);
      v8 factor[VECTORS];
      for (int v = 0; v < vectors; ++v) factor[v] = *(const v8u *)(factors + v * factors_stride);
      for (int r = 0; r < WIDE; ++r) {
        v8 numbers = load(data + at[r], dtype);
        for (int v = 0; v < vectors; ++v) sum[v][r] += factor[v] * numbers;
      }
    }
    if (c == columns) continue;
    for (int v = 0; v < vectors; ++v) {
      v8 factor = load_rest((const char *)(factors + v * factors_stride), columns - c, FLOAT32);
      for (int r = 0; r < WIDE; ++r)
        sum[v][r] += factor * load_rest(data + at[r], columns - c, dtype);
    }
    factors += columns - c;
  }
  /* Unrolled, so that the sums need not be stored before they are shuffled. */
#pragma GCC unroll 3
  for (int v = 0; v < vectors; ++v) {
    v4u four = sum4(sum[v]);
    float *to = sums + v * sums_stride;
    if (rows == WIDE) *(v4u *)to = four;
    else for (int r = 0; r < rows; ++r) to[r] = four[r];
  }
}

/* The same for any number of rows and vectors. */
INLINE void along(int64_t vectors, const float *factors, int64_t factors_stride,
                  const struct part *matrix, int64_t num_parts, int64_t rows, int64_t stride,
                  float *sums, int64_t sums_stride, int64_t ahead, int dtype) {
  for (int64_t r = 0; r < rows; r += WIDE)
    for (int64_t v = 0; v < vectors; v += VECTORS) {
#define DOT_ROWS(count)                                                                         \
  dot_rows(count, factors + v * factors_stride, factors_stride, matrix, num_parts, r * stride,  \
           lesser(WIDE, rows - r), stride, sums + v * sums_stride + r, sums_stride,             \
           v ? 0 : ahead, dtype)
      switch (vectors - v) {
        case 1: DOT_ROWS(1); break;
        case 2: DOT_ROWS(2); break;
        default: DOT_ROWS(3);
      }
    }
}

/* `sums`, of the task: [vectors of the KV head, head_size rounded up to 8], where keys are mixed. */
INLINE void run_task(const struct call *call, int64_t row, int64_t kv_head, int64_t first,
                     float *sums, int dtype) {
  int operation = call->operation;
  int64_t size = size_of(dtype), block_size = call->block_size, head_size = call->head_size;
  int64_t vectors = call->num_heads / call->num_kv_heads * call->num_vectors;
  int64_t of_head = (row * call->num_kv_heads + kv_head) * vectors;
  int64_t end = lesser(first + chunk_keys(call), call->num_keys);
  int64_t last = lesser(end, call->lengths[row]);
  int64_t width = round_up(head_size, 8), num_keys = call->num_keys;
  const float *x = call->vectors + of_head * head_size, *w = call->vectors + of_head * num_keys;
  float *output = call->output + of_head * num_keys;
  struct part keys[CHUNK];
  int64_t num_parts = 0;
  for (int64_t at = first; at < last; at += block_size) {
    int64_t count = lesser(block_size, last - at);
    const int64_t *block = call->blocks + row * call->blocks_per_row + at / block_size;
    const char *key = (const char *)call->kv_cache +
                      (*block * call->block_stride + kv_head * call->kv_head_stride) * size;
    int64_t next = at + block_size < last ? (block[1] - block[0]) * call->block_stride * size : 0;
    const char *value = key + block_size * head_size * size;
    struct part whole = {value, head_size};
    switch (operation) {
      case WITH_KEYS:
        down(vectors, x, head_size, key, head_size, block_size * size,
             lesser(block_size, round_up(count, 8)), output + at, num_keys, count, 1, next, dtype);
        break;
      case WITH_VALUES:
        along(vectors, x, head_size, &whole, 1, count, head_size * size, output + at, num_keys,
              next, dtype);
        break;
      case MIX_KEYS: keys[num_parts++] = (struct part){key, count}; break;
      case MIX_VALUES: /* a tile at a time, to be in the L1 cache for all vectors */
        for (int64_t j = 0; j < count; j += TILE)
          down(vectors, w + at + j, num_keys, value + j * head_size * size,
               lesser(TILE, count - j), head_size * size, head_size, sums, width, width,
               at + j == first, next, dtype);
        break;
    }
  }
  if (operation == MIX_KEYS && num_parts)
    along(vectors, w + first, num_keys, keys, num_parts, head_size, block_size * size, sums, width,
          WIDE * block_size * size, dtype);
  if (operation == WITH_KEYS || operation == WITH_VALUES) {
    int64_t padding = last > first ? last : first;
    for (int64_t v = 0; v < vectors; ++v)
      memset(output + v * num_keys + padding, 0, (end - padding) * sizeof(float));
  }
}

static void choose(const struct call *call, int64_t row, int64_t kv_head, int64_t first,
                   float *sums) {
  switch (call->dtype) {
    case FLOAT32: run_task(call, row, kv_head, first, sums, FLOAT32); break;
    case BFLOAT16: run_task(call, row, kv_head, first, sums, BFLOAT16); break;
    case FLOAT16: run_task(call, row, kv_head, first, sums, FLOAT16); break;
  }
}

/* Add the chunks of one (row, KV head). */
static void finish(const struct call *call, int64_t part, int64_t chunks, const float *sums) {
  int64_t vectors = call->num_heads / call->num_kv_heads * call->num_vectors;
  int64_t width = round_up(call->head_size, 8);
  int64_t used = parts(call->lengths[part / call->num_kv_heads], chunk_keys(call));
  sums += part * chunks * vectors * width;
  for (int64_t v = 0; v < vectors; ++v) {
    float *output = call->output + (part * vectors + v) * call->head_size;
    memcpy(output, sums + v * width, call->head_size * sizeof(float));
    for (int64_t c = 1; c < used; ++c)
      for (int64_t d = 0; d < call->head_size; ++d)
        output[d] += sums[(c * vectors + v) * width + d];
  }
}

/* No size may be 0. Returns 0, or what went wrong; nothing is written then. */
int headway_cache_products(const struct call *call) {
  for (int64_t row = 0; row < call->num_rows; ++row) {
    const int64_t *blocks = call->blocks + row * call->blocks_per_row;
    for (int64_t b = 0; b < parts(call->lengths[row], call->block_size); ++b)
      if (blocks[b] < 0 || blocks[b] >= call->num_blocks) return NO_SUCH_BLOCK;
  }
  int64_t chunk = chunk_keys(call), chunks = parts(call->num_keys, chunk);
  int64_t num_parts = call->num_rows * call->num_kv_heads;
  int64_t num_sums = call->num_heads / call->num_kv_heads * call->num_vectors *
                     round_up(call->head_size, 8);
  int mixed = call->operation == MIX_KEYS || call->operation == MIX_VALUES;
  float *sums = NULL;
  if (mixed && !(sums = malloc(num_parts * chunks * num_sums * sizeof(float))))
    return OUT_OF_MEMORY;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_parts * chunks; ++task) {
      int64_t part = task / chunks;
      choose(call, part / call->num_kv_heads, part % call->num_kv_heads, task % chunks * chunk,
             mixed ? sums + task * num_sums : NULL);
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < (mixed ? num_parts : 0); ++part)
      finish(call, part, chunks, sums);
  }
  free(sums);
  return 0;
}
