/* Residual edit on CPU: for each row a probe picks a direction, which is added to the row. The caller
 * is residual_edit.py, which has the formulas.
 *
 * One call edits all rows of a layer, whatever edits they have: a decode step has a row a request, and
 * calling torch once a request takes longer than the model's own layer. A row's result depends on no
 * other row and not on the number of threads.
 */
#include "cpu_vectors.h"

enum { RMS, ADD, REMOVE };
enum { MIN_PARALLEL = 1 << 17 };

struct edit {
  const float *directions; /* [clusters, size] */
  const float *weights;    /* as directions, NULL where there is nothing to pick */
  const float *bias;       /* [clusters] */
  int64_t clusters;
  float strength;
  int32_t form;
};

struct call {
  void *hidden;           /* [tokens, size] */
  const void *residual;   /* the same, or NULL */
  const int64_t *rows;    /* [num_rows], without repetition */
  const int64_t *which;   /* [num_rows], index of the row's edit */
  const struct edit *edits;
  int64_t num_rows, size, hidden_stride, residual_stride;
  int32_t bf16;
};

INLINE float dot(const float *x, const float *y, int64_t size) {
  v8 sums[2] = {{0}};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    sums[0] += *(const v8u *)(x + i) * *(const v8u *)(y + i);
    sums[1] += *(const v8u *)(x + i + 8) * *(const v8u *)(y + i + 8);
  }
  float sum = sum8(sums[0] + sums[1]);
  for (; i < size; ++i) sum += x[i] * y[i];
  return sum;
}

/* The first of the largest logits; 0 where none can be compared. */
INLINE int64_t pick(const struct edit *edit, const float *x, float inverse, int64_t size) {
  if (!edit->weights) return 0;
  int64_t best = 0;
  float highest = -INFINITY;
  for (int64_t k = 0; k < edit->clusters; ++k) {
    float logit = dot(edit->weights + k * size, x, size) * inverse + edit->bias[k];
    if (logit > highest) { highest = logit; best = k; }
  }
  return best;
}

INLINE void edit_row(const struct call *call, int64_t index, int bf16) {
  int64_t row = call->rows[index], size = call->size;
  const struct edit *edit = call->edits + call->which[index];
  int64_t at = row * call->hidden_stride, other = row * call->residual_stride;
  float x[size];
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    v8 sum = load8(call->hidden, at + i, bf16);
    if (call->residual) sum += load8(call->residual, other + i, bf16);
    *(v8u *)(x + i) = sum;
  }
  for (; i < size; ++i) {
    x[i] = load1(call->hidden, at + i, bf16);
    if (call->residual) x[i] += load1(call->residual, other + i, bf16);
  }
  float rms = sqrtf(dot(x, x, size) / size);
  const float *v = edit->directions + pick(edit, x, rms > 0 ? 1.0f / rms : 0.0f, size) * size;
  float amount = edit->strength;
  if (edit->form == RMS) amount *= rms;
  if (edit->form == REMOVE) {
    float square = dot(v, v, size);
    amount = square > 0 ? -amount * (dot(x, v, size) / square) : 0.0f;
  }
  if (amount == 0.0f) return;
  for (i = 0; i < size; ++i) {
    float before = load1(call->hidden, at + i, bf16);
    store1(call->hidden, at + i, before + amount * v[i], bf16);
  }
}

void headway_residual_edit(const struct call *call) {
  int64_t work = call->num_rows * call->size;
#pragma omp parallel for schedule(static) if (work >= MIN_PARALLEL)
  for (int64_t index = 0; index < call->num_rows; ++index) {
    if (call->bf16) edit_row(call, index, 1);
    else edit_row(call, index, 0);
  }
}
