/* Segment attention on vLLM's paged CPU cache: attention with the head word, in one pass over the
 * keys and values. The formula is in reference.py, the caller and the meaning of every argument
 * in segment_attention.py.
 *
 * A task is a tile of query rows of one sequence and one KV head: all query heads that share the
 * KV head (GQA) go together. Keys are visited 32 at a time with an online softmax. Every key falls
 * into one of four segments (in neither class, in A, in B, in both), and each segment has its own
 * accumulator; gains depend on the masses, which are known only at the end, and are applied to the
 * accumulators then. So moving mass between classes costs no second pass.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu_vectors.h"

enum {
  GAMMA, BIAS_A, BIAS_B, ABS_GAIN_A, ABS_GAIN_B, MOVED_SHARE, GAIN_B, RENORM, IDENTITY_MIX,
  MIN_IMAGE_MASS, MIN_SHARE_B, MIN_IMAGE_REST,
  REQUIRE_A, EXCLUDE_A, WINDOW_A, REQUIRE_B, EXCLUDE_B, WINDOW_B, NUM_FIELDS
};
enum { TAG_IMAGE = 1, TAG_OUTPUT = 8 };
enum { MAX_ROWS = 48, SEGMENTS = 4 };

struct call {
  const void *query;           /* [num_tokens, num_heads, head_size] */
  void *output;                /* as query */
  const void *kv_cache;        /* [blocks, num_kv_heads, 2 * block_size * head_size] */
  const int32_t *block_table;  /* [table rows, block_table_stride] */
  /* The next seven: [num_sequences] each. */
  const int32_t *first_row;    /* row of the query tensor */
  const int32_t *num_rows;
  const int32_t *position;     /* of the first row */
  const int32_t *prompt_len;
  const int32_t *table_row;    /* row of the block table */
  const int32_t *tag_row;      /* row of tags; -1: none */
  const int32_t *mass_row;     /* row of masses of the first row; -1: none are read */
  const uint8_t *tags;         /* [tag rows, tags_stride]: by position, or NULL */
  const uint8_t *slot_tags;    /* [blocks * block_size]: by cache slot, for prompt keys, or NULL */
  const float *words;          /* [num_sequences, num_heads, words_stride] */
  float *masses;               /* [mass rows, num_heads, 4], or NULL */
  int64_t query_stride, output_stride; /* elements between two tokens */
  int64_t block_stride, kv_head_stride; /* elements */
  int64_t block_table_stride, tags_stride, words_stride;
  int32_t num_sequences, num_heads, num_kv_heads, head_size, block_size, sliding_window;
  float softmax_scale, soft_cap;
  int32_t is_bfloat16;
};

struct task { int32_t sequence, kv_head, head, heads, row, rows; };

struct class { int require, exclude, window, in_logits, in_values; };

/* What one (row, head) does, read once from its word. */
struct query {
  const float *word;
  int position, first_key; /* visible keys: first_key .. position */
  struct class a, b;
  int needs_masses, needs_image;
  uint8_t segments_used;
  float max, sum, mass[SEGMENTS], image_in_b, image_rest;
};

enum membership { NONE, ALL, MIXED };

/* Which keys of a tile are in a class: fills `in` with 0 or -1 where the answer is MIXED. */
INLINE enum membership members(const struct class *class, const uint8_t *tags, int tags_or,
                               int tags_and, int distance, int first, int last, int32_t *in) {
  /* distance: of the tile's key 0 from the query; key j is at distance - j. */
  int near = distance - (last - 1), far = distance - first;
  if ((class->require & ~tags_or) || (class->exclude & tags_and)) return NONE;
  int all = !(class->require & ~tags_and) && !(class->exclude & tags_or);
  if (class->window) {
    if (near > class->window || far < 1) return NONE;
    all &= near >= 1 && far <= class->window;
  }
  if (all) return ALL;
  int window = class->window ? class->window : INT32_MAX, nearest = class->window ? 1 : -TILE;
  for (int j = 0; j < TILE; ++j) {
    int ok = (tags[j] & class->require) == class->require && !(tags[j] & class->exclude) &&
             distance - j >= nearest && distance - j <= window;
    in[j] = -ok;
  }
  return MIXED;
}

INLINE void bias(float *logits, const float *raw, float add, float abs_gain,
                 enum membership kind, const int32_t *in) {
  for (int c = 0; c < TILE; c += 8) {
    v8 x = *(const v8u *)(raw + c);
    v8 change = splat(add) + splat(abs_gain) * (v8)((i8)x & 0x7fffffff);
    if (kind == MIXED) change = (v8)((i8)change & *(const i8 *)(in + c));
    *(v8u *)(logits + c) += change;
  }
}

INLINE float masked_sum(const float *weights, enum membership kind, const int32_t *in) {
  if (kind == NONE) return 0.0f;
  v8 sum = {0};
  for (int c = 0; c < TILE; c += 8) {
    v8 w = *(const v8u *)(weights + c);
    sum += kind == ALL ? w : (v8)((i8)w & *(const i8 *)(in + c));
  }
  return sum8(sum);
}

/* Split the weights of a tile by segment. Returns the set of segments met; `split` holds the
 * weights of each segment met, unless it is the only one, whose weights are `weights` itself. */
INLINE int split_weights(const float *weights, enum membership a, const int32_t *in_a,
                         enum membership b, const int32_t *in_b, float (*split)[TILE]) {
  if (a != MIXED && b != MIXED) return 1 << ((a == ALL) + 2 * (b == ALL));
  int met = 0;
  for (int s = 0; s < SEGMENTS; ++s) {
    int want_a = s & 1, want_b = s >> 1;
    if ((a == NONE && want_a) || (a == ALL && !want_a)) continue;
    if ((b == NONE && want_b) || (b == ALL && !want_b)) continue;
    i8 any = {0};
    for (int c = 0; c < TILE; c += 8) {
      i8 in = (i8){-1, -1, -1, -1, -1, -1, -1, -1};
      if (a == MIXED) in &= want_a ? *(const i8 *)(in_a + c) : ~*(const i8 *)(in_a + c);
      if (b == MIXED) in &= want_b ? *(const i8 *)(in_b + c) : ~*(const i8 *)(in_b + c);
      any |= in;
      *(v8u *)(split[s] + c) = (v8)((i8)*(const v8u *)(weights + c) & in);
    }
    for (int lane = 0; lane < 8; ++lane)
      if (any[lane]) { met |= 1 << s; break; }
  }
  return met;
}

static void read_word(struct query *query, const float *word, int position, int sliding_window,
                      int read_masses) {
  memset(query, 0, sizeof *query);
  query->word = word;
  query->position = position;
  query->first_key = sliding_window > 0 && position >= sliding_window ? position - sliding_window + 1 : 0;
  int moves = word[MOVED_SHARE] != 0.0f, gains = word[GAIN_B] != 1.0f;
  query->a = (struct class){(int)word[REQUIRE_A], (int)word[EXCLUDE_A], (int)word[WINDOW_A],
                            word[BIAS_A] != 0.0f || word[ABS_GAIN_A] != 0.0f, moves};
  query->b = (struct class){(int)word[REQUIRE_B], (int)word[EXCLUDE_B], (int)word[WINDOW_B],
                            word[BIAS_B] != 0.0f || word[ABS_GAIN_B] != 0.0f, moves || gains};
  query->needs_image = read_masses || word[MIN_IMAGE_MASS] > 0.0f || word[MIN_SHARE_B] > 0.0f ||
                       word[MIN_IMAGE_REST] > 0.0f;
  query->needs_masses = moves || gains || query->needs_image;
  query->max = -3.0e38f;
}

struct tile {
  const void *values;
  const uint8_t *tags;
  int tags_or, tags_and, first_position, head_size, bf16;
};

/* Softmax, masses and segments of one query over one tile. Appends to `products`. */
INLINE int visit(struct query *q, const struct tile *tile, float *logits, float *sums,
                 int64_t segment_stride, float (*split)[TILE], struct product *products,
                 float soft_cap) {
  int first = q->first_key - tile->first_position, last = q->position + 1 - tile->first_position;
  first = first < 0 ? 0 : first;
  last = last > TILE ? TILE : last;
  if (first >= last) return 0;
  const float *word = q->word;
  int distance = q->position - tile->first_position;
  int32_t in_a[TILE] __attribute__((aligned(32))), in_b[TILE] __attribute__((aligned(32)));
  enum membership a = NONE, b = NONE;
  if (q->a.in_logits || q->a.in_values || q->needs_masses)
    a = members(&q->a, tile->tags, tile->tags_or, tile->tags_and, distance, first, last, in_a);
  if (q->b.in_logits || q->b.in_values || q->needs_masses)
    b = members(&q->b, tile->tags, tile->tags_or, tile->tags_and, distance, first, last, in_b);
  if (soft_cap > 0.0f)
    for (int j = first; j < last; ++j) logits[j] = soft_cap * tanhf(logits[j] / soft_cap);
  int edit_a = q->a.in_logits && a != NONE, edit_b = q->b.in_logits && b != NONE;
  if (edit_a || edit_b || word[GAMMA] != 1.0f) {
    float raw[TILE] __attribute__((aligned(32)));
    memcpy(raw, logits, sizeof raw);
    for (int c = 0; c < TILE; c += 8)
      *(v8u *)(logits + c) = splat(word[GAMMA]) * *(v8u *)(raw + c);
    if (edit_a) bias(logits, raw, word[BIAS_A], word[ABS_GAIN_A], a, in_a);
    if (edit_b) bias(logits, raw, word[BIAS_B], word[ABS_GAIN_B], b, in_b);
  }
  /* Beyond the visible keys the cache may hold anything, NaN included. */
  for (int j = 0; j < first; ++j) logits[j] = -INFINITY;
  for (int j = last; j < TILE; ++j) logits[j] = -INFINITY;

  v8 *x = (v8 *)logits;
  v8 best = x[0];
  for (int c = 1; c < 4; ++c) best = (v8)(((i8)best & (best > x[c])) | ((i8)x[c] & ~(best > x[c])));
  float max = max8(best);
  if (max > q->max) {
    float shrink = q->sum > 0.0f ? expf(q->max - max) : 0.0f;
    q->max = max;
    q->sum *= shrink;
    q->image_in_b *= shrink;
    q->image_rest *= shrink;
    for (int s = 0; s < SEGMENTS; ++s) {
      q->mass[s] *= shrink;
      if (q->segments_used >> s & 1)
        for (int d = 0; d < tile->head_size; ++d) sums[s * segment_stride + d] *= shrink;
    }
  }
  v8 total = {0};
  for (int c = 0; c < 4; ++c) {
    x[c] = exp8(x[c] - splat(q->max));
    total += x[c];
  }
  q->sum += sum8(total);

  if (q->needs_masses) {
    int met = split_weights(logits, a, in_a, b, in_b, split);
    int alone = (met & (met - 1)) == 0;
    for (int s = 0; s < SEGMENTS; ++s)
      if (met >> s & 1) q->mass[s] += masked_sum(alone ? logits : split[s], ALL, NULL);
    if (q->needs_image && (tile->tags_or & TAG_IMAGE)) {
      int32_t in[TILE] __attribute__((aligned(32)));
      struct class image = {TAG_IMAGE, 0, 0, 0, 0};
      enum membership kind =
          members(&image, tile->tags, tile->tags_or, tile->tags_and, distance, first, last, in);
      float all = masked_sum(logits, kind, in), both = b == ALL ? all : 0.0f;
      if (b == MIXED) {
        if (kind == MIXED)
          for (int c = 0; c < TILE; c += 8) *(i8 *)(in + c) &= *(i8 *)(in_b + c);
        both = masked_sum(logits, MIXED, kind == MIXED ? in : in_b);
        float rest = 0.0f; /* summed by itself: exactly 0 where no key is in it */
        for (int j = first; j < last; ++j)
          rest += (tile->tags[j] & TAG_IMAGE) && !in_b[j] ? logits[j] : 0.0f;
        q->image_rest += rest;
      } else if (b == NONE) {
        q->image_rest += all;
      }
      q->image_in_b += both;
    }
  }

  int met = 1;
  enum membership value_a = q->a.in_values ? a : NONE, value_b = q->b.in_values ? b : NONE;
  if (q->a.in_values || q->b.in_values) met = split_weights(logits, value_a, in_a, value_b, in_b, split);
  int alone = (met & (met - 1)) == 0, added = 0;
  for (int s = 0; s < SEGMENTS; ++s) {
    if (!(met >> s & 1)) continue;
    float *sum = sums + s * segment_stride;
    if (!(q->segments_used >> s & 1)) memset(sum, 0, tile->head_size * sizeof(float));
    q->segments_used |= 1 << s;
    products[added++] = (struct product){sum, alone ? logits : split[s]};
  }
  return added;
}

INLINE const int32_t *block_row(const struct call *call, int sequence) {
  return call->block_table + call->table_row[sequence] * call->block_table_stride;
}

/* The weights' gains by segment, already divided by the softmax sum; see reference.py. */
INLINE void gains(const struct query *q, float *gain, float *identity, float *edited) {
  const float *word = q->word;
  float scale = 1.0f / q->sum;
  float mass_a = (q->mass[1] + q->mass[3]) * scale, mass_b = (q->mass[2] + q->mass[3]) * scale;
  float image_b = q->image_in_b * scale, image = image_b + q->image_rest * scale;
  int met = image >= word[MIN_IMAGE_MASS] && image_b >= word[MIN_SHARE_B] * image &&
            q->image_rest * scale >= word[MIN_IMAGE_REST];
  float gain_a = 1.0f, gain_b = 1.0f;
  *identity = 0.0f;
  *edited = (float)met;
  if (met) {
    gain_b = word[GAIN_B];
    if (word[MOVED_SHARE] != 0.0f && mass_b > 0.0f) {
      gain_a = 1.0f - word[MOVED_SHARE];
      gain_b += word[MOVED_SHARE] * mass_a / mass_b;
    }
    *identity = word[IDENTITY_MIX];
  }
  gain[0] = 1.0f;
  gain[1] = gain_a;
  gain[2] = gain_b;
  gain[3] = gain_a * gain_b;
  float norm = scale;
  if (met && word[RENORM] != 0.0f && q->needs_masses) {
    float sum = 0.0f;
    for (int s = 0; s < SEGMENTS; ++s) sum += gain[s] * q->mass[s];
    if (sum > 0.0f) norm = 1.0f / sum;
  }
  for (int s = 0; s < SEGMENTS; ++s) gain[s] *= norm;
}

INLINE void finish(const struct call *call, const struct task *task, struct query *queries,
                   const float *sums, int64_t segment_stride, int bf16) {
  int head_size = call->head_size, block_size = call->block_size;
  for (int m = 0; m < task->rows * task->heads; ++m) {
    struct query *q = queries + m;
    int row = task->row + m / task->heads, head = task->head + m % task->heads;
    float gain[SEGMENTS], identity, edited;
    gains(q, gain, &identity, &edited);
    const int32_t *blocks = block_row(call, task->sequence);
    int64_t own = blocks[q->position / block_size] * call->block_stride +
                  task->kv_head * call->kv_head_stride + (int64_t)block_size * head_size +
                  (int64_t)(q->position % block_size) * head_size;
    int64_t out = (call->first_row[task->sequence] + row) * call->output_stride +
                  (int64_t)head * head_size;
    for (int d = 0; d < head_size; ++d) {
      float z = 0.0f;
      for (int s = 0; s < SEGMENTS; ++s)
        if (q->segments_used >> s & 1)
          z += gain[s] * sums[s * segment_stride + (int64_t)m * head_size + d];
      if (identity != 0.0f)
        z = (1.0f - identity) * z + identity * load1(call->kv_cache, own + d, bf16);
      store1(call->output, out + d, z, bf16);
    }
    if (call->mass_row[task->sequence] >= 0) {
      float *mass = call->masses +
          ((int64_t)(call->mass_row[task->sequence] + row) * call->num_heads + head) * 4;
      mass[0] = (q->mass[1] + q->mass[3]) / q->sum;
      mass[1] = (q->mass[2] + q->mass[3]) / q->sum;
      mass[2] = (q->image_in_b + q->image_rest) / q->sum;
      mass[3] = edited;
    }
  }
}

struct scratch {
  struct query queries[MAX_ROWS];
  struct product products[MAX_ROWS * SEGMENTS];
  float logits[MAX_ROWS][TILE] __attribute__((aligned(64)));
  float split[MAX_ROWS][SEGMENTS][TILE] __attribute__((aligned(64)));
  uint8_t tags[TILE];
};

INLINE void run_task(const struct call *call, const struct task *task, struct scratch *scratch,
                     float *q, float *sums, int bf16) {
  int count = task->rows * task->heads;
  int head_size = call->head_size, block_size = call->block_size, sequence = task->sequence;
  int64_t segment_stride = (int64_t)MAX_ROWS * head_size;
  int first = INT32_MAX, last = 0;
  for (int m = 0; m < count; ++m) {
    int row = task->row + m / task->heads, head = task->head + m % task->heads;
    int position = call->position[sequence] + row;
    const float *word = call->words +
        ((int64_t)sequence * call->num_heads + head) * call->words_stride;
    read_word(scratch->queries + m, word, position, call->sliding_window,
              call->mass_row[sequence] >= 0);
    int64_t at = (call->first_row[sequence] + row) * call->query_stride + (int64_t)head * head_size;
    for (int d = 0; d < head_size; ++d)
      q[m * head_size + d] = call->softmax_scale * load1(call->query, at + d, bf16);
    if (scratch->queries[m].first_key < first) first = scratch->queries[m].first_key;
    if (position + 1 > last) last = position + 1;
  }
  int prompt_len = call->prompt_len[sequence], tag_row = call->tag_row[sequence];
  const uint8_t *tags = tag_row < 0 ? NULL : call->tags + tag_row * call->tags_stride;
  const int32_t *blocks = block_row(call, sequence);
  int64_t element = bf16 ? sizeof(uint16_t) : sizeof(float);
  for (int start = first & ~(TILE - 1); start < last; start += TILE) {
    int64_t block = blocks[start / block_size];
    int offset = start % block_size;
    int from = first > start ? first - start : 0, to = last - start < TILE ? last - start : TILE;
    const char *keys = (const char *)call->kv_cache +
        (block * call->block_stride + task->kv_head * call->kv_head_stride) * element;
    const char *values = keys + ((int64_t)block_size + offset) * head_size * element;
    struct tile tile = {values, scratch->tags, 0, 255, start, head_size, bf16};
    for (int j = 0; j < TILE; ++j) {
      int tag = start + j >= prompt_len ? TAG_OUTPUT : 0;
      if (j >= from && j < to) {
        if (tags) tag |= tags[start + j];
        if (call->slot_tags && start + j < prompt_len)
          tag |= call->slot_tags[block * block_size + offset + j];
        tile.tags_or |= tag;
        tile.tags_and &= tag;
      }
      scratch->tags[j] = (uint8_t)tag;
    }
    all_dots(count, q, head_size, keys + offset * element, block_size, scratch->logits[0], bf16);
    int added = 0;
    for (int m = 0; m < count; ++m)
      added += visit(scratch->queries + m, &tile, scratch->logits[m], sums + m * head_size,
                     segment_stride, scratch->split[m], scratch->products + added, call->soft_cap);
    add_all_values(added, scratch->products, values, head_size, from, to, bf16);
  }
  finish(call, task, scratch->queries, sums, segment_stride, bf16);
}

/* Returns 0, or 1 if memory ran out (nothing is written then). */
int headway_segment_attention(const struct call *call) {
  int group = call->num_heads / call->num_kv_heads;
  int heads_per_task = group < MAX_ROWS ? group : MAX_ROWS;
  int rows_per_task = MAX_ROWS / heads_per_task;
  int64_t num_tasks = 0, next = 0;
  int64_t parts = (int64_t)call->num_kv_heads * ((group + heads_per_task - 1) / heads_per_task);
  for (int s = 0; s < call->num_sequences; ++s)
    num_tasks += (call->num_rows[s] + rows_per_task - 1) / rows_per_task * parts;
  if (num_tasks == 0) return 0;
  struct task *tasks = malloc(num_tasks * sizeof *tasks);
  if (!tasks) return 1;
  for (int s = 0; s < call->num_sequences; ++s)
    for (int row = 0; row < call->num_rows[s]; row += rows_per_task)
      for (int kv_head = 0; kv_head < call->num_kv_heads; ++kv_head)
        for (int head = 0; head < group; head += heads_per_task) {
          int rows = call->num_rows[s] - row, heads = group - head;
          tasks[next++] = (struct task){
              s, kv_head, kv_head * group + head, heads < heads_per_task ? heads : heads_per_task,
              row, rows < rows_per_task ? rows : rows_per_task};
        }
  int failed = 0;
#pragma omp parallel
  {
    size_t vectors = (size_t)MAX_ROWS * call->head_size * sizeof(float);
    struct scratch *scratch = aligned_alloc(64, (sizeof *scratch + 63) & ~(size_t)63);
    float *memory = aligned_alloc(64, vectors * (1 + SEGMENTS));
    int ok = scratch && memory;
    if (!ok) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp barrier
    int go;
#pragma omp atomic read
    go = failed;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < num_tasks; ++t) {
      if (go) continue;
      float *sums = memory + vectors / sizeof(float);
      if (call->is_bfloat16) run_task(call, tasks + t, scratch, memory, sums, 1);
      else run_task(call, tasks + t, scratch, memory, sums, 0);
    }
    free(scratch);
    free(memory);
  }
  free(tasks);
  return failed;
}
