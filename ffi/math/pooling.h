// The arithmetic of a compressor, in an order that depends only on a row's place in its window: softmax pooling in
// groups of eight rows that merge pairwise (from a running tail: row after row), RMSNorm with its sum of squares as a
// balanced tree, RoPE on the trailing channels.
#pragma once

#include <cmath>

#include "layout/bits.h"
#include "layout/geometry.h"

namespace dsv4 {

constexpr int kGroupRows = 8;  // rows of a softmax group: a CSA entry is one group, an HCA entry 16

constexpr float kLog2E = 1.44269504f;

#if defined(__CUDACC__)
__device__ __forceinline__ float two_to_the(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// e^x for x <= 0, within 2 ulp near 0; 0 below -87. The GPU takes its own exponential, an order of magnitude faster
// than arithmetic that a CPU could follow to the bit: pooled values of the two agree within rounding.
DSV4_HOST_DEVICE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return two_to_the(x * kLog2E);
#else
  if (!(x >= -87.0f)) return x != x ? x : 0.0f;
  const float n = round_to_even(x * kLog2E);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * (r * r) + r + 1.0f;
  return y * float_of(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
#endif
}

// a * b + c. Rounded once on the GPU, whose pooled values are its own anyway.
DSV4_HOST_DEVICE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// One channel of a partly pooled window.
struct SoftmaxPartial {
  float max;
  float denominator;
  float sum;
};

// Pooling by groups counts in powers of two on the GPU: a weight then costs one multiplication fewer, and its exponent
// is rounded once. A group's maximum is a score times this scale.
DSV4_HOST_DEVICE float group_scale() {
#if defined(__CUDA_ARCH__)
  return kLog2E;
#else
  return 1.0f;
#endif
}

// The weight beside a maximum of what lies `x` <= 0 from it on that scale.
DSV4_HOST_DEVICE float group_weight(float x) {
#if defined(__CUDA_ARCH__)
  return two_to_the(x);
#else
  return exp_nonpositive(x);
#endif
}

// No score is special. A row that does not exist has the score -inf (kNoScore) and so the weight 0, as has a row that a
// caller masks with -inf; where every row has it the entry is NaN, as a softmax is. The largest score is subtracted
// everywhere but where it is -inf itself, which would be no number.
constexpr float kNoScore = -INFINITY;

DSV4_HOST_DEVICE float finite_or_zero(float max) { return max == kNoScore ? 0.0f : max; }

// Below this, scores in powers of two would overflow to -inf. Floats that far out lie so far apart that their weights
// are 1 or 0 on any scale; groups of them merge as equals.
constexpr float kLowestScaledScore = -2e38f;

DSV4_HOST_DEVICE SoftmaxPartial pool_group(const float (&kv)[kGroupRows], const float (&score)[kGroupRows]) {
  float largest = score[0];
  for (int row = 1; row < kGroupRows; ++row) largest = max_ignoring_nan(largest, score[row]);
  const bool scaled = largest >= kLowestScaledScore || group_scale() == 1.0f;
  const float scale = scaled ? group_scale() : 0.25f;
  const float shift = finite_or_zero(largest) * scale;
  float denominator = 0.0f, sum = 0.0f;
  for (int row = 0; row < kGroupRows; ++row) {
    const float weight = group_weight(multiply_add(score[row], scale, -shift));
    denominator += weight;
    sum = multiply_add(weight, kv[row], sum);
  }
  return {scaled || largest == kNoScore ? largest * scale : -kFloatMax, denominator, sum};
}

DSV4_HOST_DEVICE SoftmaxPartial merge(const SoftmaxPartial& a, const SoftmaxPartial& b) {
  const float max = max_ignoring_nan(a.max, b.max), shift = finite_or_zero(max);
  const float scale_a = group_weight(a.max - shift), scale_b = group_weight(b.max - shift);
  return {max, multiply_add(a.denominator, scale_a, b.denominator * scale_b),
          multiply_add(a.sum, scale_a, b.sum * scale_b)};
}

// The state of a running tail before its window's first row.
constexpr SoftmaxPartial kEmptyPartial{kNoScore, 0.0f, 0.0f};

// One more row of a running tail. The heavier side weighs 1, so that a row costs one exponential.
DSV4_HOST_DEVICE SoftmaxPartial fold(const SoftmaxPartial& open, float kv, float score) {
  const bool heavier = score > open.max;
  const float lighter = exp_nonpositive(heavier ? open.max - score : score - finite_or_zero(open.max));
  const float keep = heavier ? lighter : 1.0f, weight = heavier ? 1.0f : lighter;
  return {heavier ? score : open.max, multiply_add(open.denominator, keep, weight),
          multiply_add(open.sum, keep, weight * kv)};
}

DSV4_HOST_DEVICE float pooled(const SoftmaxPartial& partial) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(partial.denominator));
  return partial.sum * inverse;
#else
  return partial.sum / partial.denominator;
#endif
}

// The leaf of RMSNorm's sum: four consecutive channels. Sums of neighbouring leaves are added pairwise up to the row.
DSV4_HOST_DEVICE float square_sum(const float (&x)[4]) {
  return (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
}

// Half of a leaf.
DSV4_HOST_DEVICE float square_sum(const float (&x)[2]) { return x[0] * x[0] + x[1] * x[1]; }

DSV4_HOST_DEVICE float inverse_rms(float sum_of_squares, int width, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + eps);
}

// Rotates pairs of neighbouring channels by the angles of pairs `pair`, `pair + 1`, ...
template <int N>
DSV4_HOST_DEVICE void rotate_pairs(float (&x)[N], const float* cos, const float* sin, int pair) {
  for (int i = 0; i < N / 2; ++i) {
    const float c = cos[pair + i], s = sin[pair + i];
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * c - odd * s;
    x[2 * i + 1] = odd * c + even * s;
  }
}

constexpr float kHadamardScale = 0.08838834764831845f;  // 128^-1/2

}  // namespace dsv4
