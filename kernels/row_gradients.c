/* The parts of a decoder layer's way back that go number by number, for a few rows: through a norm,
 * a gated activation, and a rotary embedding. The caller is row_gradients.py, which has the formulas.
 *
 * A row is a few thousand numbers. As single operations of torch, each of these is up to ten passes
 * over them, and takes longer to call than to compute.
 */
#include <string.h>

#include "cpu_vectors.h"

struct norm_call {
  const float *x;      /* [rows, heads, size] */
  const float *grad;   /* [rows, candidates, heads, size], and so is the output */
  const float *weight; /* [size] */
  float *output;
  int64_t rows, candidates, heads, size;
  double eps;
};

INLINE float weighted_dot(const float *x, const float *y, const float *weight, int64_t size) {
  v8 sums = {0};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    v8 product = *(const v8u *)(x + i) * *(const v8u *)(y + i);
    sums += weight ? product * *(const v8u *)(weight + i) : product;
  }
  float sum = sum8(sums);
  for (; i < size; ++i) sum += x[i] * y[i] * (weight ? weight[i] : 1.0f);
  return sum;
}

void headway_norm_backward(const struct norm_call *call) {
  int64_t size = call->size;
  for (int64_t row = 0; row < call->rows; ++row)
    for (int64_t candidate = 0; candidate < call->candidates; ++candidate)
      for (int64_t head = 0; head < call->heads; ++head) {
        const float *x = call->x + (row * call->heads + head) * size;
        int64_t at = ((row * call->candidates + candidate) * call->heads + head) * size;
        const float *grad = call->grad + at;
        float *output = call->output + at;
        float square = weighted_dot(x, x, NULL, size) / size;
        float inverse = 1.0f / sqrtf(square + (float)call->eps);
        float along = inverse * inverse * weighted_dot(x, grad, call->weight, size) / size;
        int64_t i = 0;
        for (; i + 8 <= size; i += 8) {
          v8 scaled = *(const v8u *)(grad + i) * *(const v8u *)(call->weight + i);
          *(v8u *)(output + i) = (scaled - *(const v8u *)(x + i) * along) * inverse;
        }
        for (; i < size; ++i) output[i] = (grad[i] * call->weight[i] - x[i] * along) * inverse;
      }
}

struct gate_call {
  const float *grad;                 /* [rows, candidates, size] */
  const float *up, *activated, *slope; /* [rows, size] */
  float *output;                     /* [rows, candidates, 2 * size] */
  int64_t rows, candidates, size, up_stride;
};

void headway_gate_backward(const struct gate_call *call) {
  int64_t size = call->size;
  for (int64_t row = 0; row < call->rows; ++row)
    for (int64_t candidate = 0; candidate < call->candidates; ++candidate) {
      int64_t at = row * call->candidates + candidate;
      const float *grad = call->grad + at * size, *up = call->up + row * call->up_stride;
      const float *activated = call->activated + row * size, *slope = call->slope + row * size;
      float *output = call->output + at * 2 * size;
      int64_t i = 0;
      for (; i + 8 <= size; i += 8) {
        v8 g = *(const v8u *)(grad + i);
        *(v8u *)(output + i) = g * *(const v8u *)(up + i) * *(const v8u *)(slope + i);
        *(v8u *)(output + size + i) = g * *(const v8u *)(activated + i);
      }
      for (; i < size; ++i) {
        output[i] = grad[i] * up[i] * slope[i];
        output[size + i] = grad[i] * activated[i];
      }
    }
}

struct turn_call {
  const float *grad;      /* [rows, candidates, heads, head_size] */
  const float *cos, *sin; /* [rows, half], or NULL: heads are copied */
  float *output;          /* [rows, candidates, width], from the first head's column on */
  int64_t row_stride, candidate_stride, head_stride; /* of grad */
  int64_t rows, candidates, heads, head_size, half, width;
  int32_t interleaved;
};

INLINE void turn_pair(const float *grad, float *output, int64_t low, int64_t high, float cos,
                      float sin) {
  output[low] = grad[low] * cos + grad[high] * sin;
  output[high] = grad[high] * cos - grad[low] * sin;
}

INLINE void turn_head(const struct turn_call *call, int64_t row, const float *grad, float *output) {
  int64_t half = call->half, turned = call->cos ? 2 * half : 0;
  memcpy(output + turned, grad + turned, (call->head_size - turned) * sizeof(float));
  if (!call->cos) return;
  const float *cos = call->cos + row * half, *sin = call->sin + row * half;
  int64_t i = 0;
  if (call->interleaved) {
    for (; i < half; ++i) turn_pair(grad, output, 2 * i, 2 * i + 1, cos[i], sin[i]);
    return;
  }
  for (; i + 8 <= half; i += 8) {
    v8 low = *(const v8u *)(grad + i), high = *(const v8u *)(grad + half + i);
    v8 c = *(const v8u *)(cos + i), s = *(const v8u *)(sin + i);
    *(v8u *)(output + i) = low * c + high * s;
    *(v8u *)(output + half + i) = high * c - low * s;
  }
  for (; i < half; ++i) turn_pair(grad, output, i, half + i, cos[i], sin[i]);
}

void headway_turn_back(const struct turn_call *call) {
  for (int64_t row = 0; row < call->rows; ++row)
    for (int64_t candidate = 0; candidate < call->candidates; ++candidate)
      for (int64_t head = 0; head < call->heads; ++head) {
        const float *grad = call->grad + row * call->row_stride +
                            candidate * call->candidate_stride + head * call->head_stride;
        float *output = call->output + (row * call->candidates + candidate) * call->width;
        turn_head(call, row, grad, output + head * call->head_size);
      }
}
