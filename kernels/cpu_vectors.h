/* Small vector arithmetic for the CPU kernels: eight floats at a time, float32 and bfloat16 storage,
 * products of a few queries with a tile of keys, and of weights with a tile of values.
 */
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif

enum { TILE = 32 }; /* keys that are visited together */

typedef float v8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8u __attribute__((vector_size(16), aligned(2)));
#define INLINE static inline __attribute__((always_inline))

INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }

INLINE v8 load8(const void *base, int64_t index, int bf16) {
  if (!bf16) return *(const v8u *)((const float *)base + index);
  h8u half = *(const h8u *)((const uint16_t *)base + index);
  return (v8)(__builtin_convertvector(half, u8) << 16);
}

INLINE float load1(const void *base, int64_t index, int bf16) {
  if (!bf16) return ((const float *)base)[index];
  union { uint32_t u; float f; } bits = {(uint32_t)((const uint16_t *)base)[index] << 16};
  return bits.f;
}

INLINE void store1(void *base, int64_t index, float value, int bf16) {
  if (!bf16) { ((float *)base)[index] = value; return; }
  union { float f; uint32_t u; } bits = {value};
  uint32_t rounded = bits.u + 0x7fff + ((bits.u >> 16) & 1); /* to nearest, ties to even */
  ((uint16_t *)base)[index] = value != value ? 0x7fc0 : (uint16_t)(rounded >> 16);
}

/* exp to about 1 ulp for x <= 0, exactly 0 below -87 (Cody and Waite reduction, degree 6). */
INLINE v8 exp8(v8 x) {
  i8 keep = x > splat(-87.0f);
  x = (v8)((i8)x & keep);
  v8 n = x * splat(1.44269504f);
  i8 whole = __builtin_convertvector(n - splat(0.5f), i8); /* towards zero; x <= 0 */
  n = __builtin_convertvector(whole, v8);
  v8 r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  v8 y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * r * r + r + splat(1.0f);
  return (v8)((i8)(y * (v8)((whole + 127) << 23)) & keep);
}

INLINE float sum8(v8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE float max8(v8 x) {
  float best = x[0];
  for (int lane = 1; lane < 8; ++lane) best = x[lane] > best ? x[lane] : best;
  return best;
}

/* Logits of `rows` <= 6 queries against 16 keys; keys are stored transposed, [head_size, stride]. */
INLINE void dot16(int rows, const float *q, int head_size, const void *k, int64_t stride,
                  float *logits, int bf16) {
  v8 sum[6][2] = {{{0}}};
  for (int d = 0; d < head_size; ++d) {
    v8 k0 = load8(k, d * stride, bf16), k1 = load8(k, d * stride + 8, bf16);
    for (int r = 0; r < rows; ++r) {
      v8 factor = splat(q[r * head_size + d]);
      sum[r][0] += factor * k0;
      sum[r][1] += factor * k1;
    }
  }
  for (int r = 0; r < rows; ++r) {
    *(v8u *)(logits + r * TILE) = sum[r][0];
    *(v8u *)(logits + r * TILE + 8) = sum[r][1];
  }
}

/* The same for `rows` <= 3 queries and 32 keys: one pass over the rows of the keys. */
INLINE void dot32(int rows, const float *q, int head_size, const void *k, int64_t stride,
                  float *logits, int bf16) {
  v8 sum[3][4] = {{{0}}};
  for (int d = 0; d < head_size; ++d) {
    for (int c = 0; c < 4; ++c) {
      v8 key = load8(k, d * stride + 8 * c, bf16);
      for (int r = 0; r < rows; ++r) sum[r][c] += splat(q[r * head_size + d]) * key;
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 4; ++c) *(v8u *)(logits + r * TILE + 8 * c) = sum[r][c];
}

INLINE void all_dots(int rows, const float *q, int head_size, const void *k, int64_t stride,
                     float *logits, int bf16) {
  switch (rows) {
    case 1: dot32(1, q, head_size, k, stride, logits, bf16); return;
    case 2: dot32(2, q, head_size, k, stride, logits, bf16); return;
    case 3: dot32(3, q, head_size, k, stride, logits, bf16); return;
  }
  int64_t half = bf16 ? 16 * sizeof(uint16_t) : 16 * sizeof(float);
  for (int side = 0; side < 2; ++side) {
    const void *keys = (const char *)k + side * half;
    int r = 0;
    for (; r + 6 <= rows; r += 6)
      dot16(6, q + r * head_size, head_size, keys, stride, logits + r * TILE + 16 * side, bf16);
    const float *rest = q + r * head_size;
    float *out = logits + r * TILE + 16 * side;
    switch (rows - r) {
      case 5: dot16(5, rest, head_size, keys, stride, out, bf16); break;
      case 4: dot16(4, rest, head_size, keys, stride, out, bf16); break;
      case 3: dot16(3, rest, head_size, keys, stride, out, bf16); break;
      case 2: dot16(2, rest, head_size, keys, stride, out, bf16); break;
      case 1: dot16(1, rest, head_size, keys, stride, out, bf16); break;
    }
  }
}

/* One accumulator and the weights of the tile's keys that go into it. */
struct product { float *sum; const float *weights; };

/* sum += weights . values for `count` <= 4 accumulators; values are [TILE, head_size]. */
INLINE void add_values(int count, const struct product *products, const void *v, int head_size,
                       int first, int last, int bf16) {
  int d = 0;
  for (; d + 16 <= head_size; d += 16) {
    v8 sum[4][2];
    for (int r = 0; r < count; ++r) {
      sum[r][0] = *(v8u *)(products[r].sum + d);
      sum[r][1] = *(v8u *)(products[r].sum + d + 8);
    }
    for (int j = first; j < last; ++j) {
      v8 v0 = load8(v, (int64_t)j * head_size + d, bf16);
      v8 v1 = load8(v, (int64_t)j * head_size + d + 8, bf16);
      for (int r = 0; r < count; ++r) {
        v8 weight = splat(products[r].weights[j]);
        sum[r][0] += weight * v0;
        sum[r][1] += weight * v1;
      }
    }
    for (int r = 0; r < count; ++r) {
      *(v8u *)(products[r].sum + d) = sum[r][0];
      *(v8u *)(products[r].sum + d + 8) = sum[r][1];
    }
  }
}

INLINE void add_all_values(int count, const struct product *products, const void *v,
                           int head_size, int first, int last, int bf16) {
  for (; count >= 4; count -= 4, products += 4)
    add_values(4, products, v, head_size, first, last, bf16);
  switch (count) {
    case 3: add_values(3, products, v, head_size, first, last, bf16); break;
    case 2: add_values(2, products, v, head_size, first, last, bf16); break;
    case 1: add_values(1, products, v, head_size, first, last, bf16); break;
  }
}
