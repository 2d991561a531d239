// Scalars to the bit: bfloat16, E4M3, E2M1 and power-of-two scales, each with one rounding rule for CPU and GPU.
//
// Everything here is plain IEEE arithmetic without contraction, so that a CPU and a GPU write the same bytes. Where the
// GPU has a conversion instruction with the same result it is used.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DSV4_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSV4_HOST_DEVICE inline
#endif

namespace dsv4 {

constexpr float kFloatMax = 3.402823466e+38f;
constexpr float kE4m3Max = 448.0f;
constexpr float kE2m1Max = 6.0f;

DSV4_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DSV4_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The larger value; a NaN in `value` is ignored, which keeps an amax finite.
DSV4_HOST_DEVICE float max_ignoring_nan(float largest, float value) {
#if defined(__CUDA_ARCH__)
  return fmaxf(largest, value);
#else
  return value > largest ? value : largest;
#endif
}

// The smaller value, likewise.
DSV4_HOST_DEVICE float min_ignoring_nan(float smallest, float value) {
#if defined(__CUDA_ARCH__)
  return fminf(smallest, value);
#else
  return value < smallest ? value : smallest;
#endif
}

DSV4_HOST_DEVICE float magnitude(float value) { return float_of(bits_of(value) & 0x7FFFFFFFu); }

DSV4_HOST_DEVICE float clamp(float value, float low, float high) {
  return value < low ? low : (value > high ? high : value);  // a NaN passes through
}

// Rounds to an integer, ties to even, for |value| < 2^22.
DSV4_HOST_DEVICE float round_to_even(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: its unit in the last place is 1
  return (value + kShift) - kShift;
}

// bfloat16 as its bits: round to nearest, ties to even; a NaN stays a (quiet) NaN.
struct bfloat16 {
  uint16_t bits;
};

DSV4_HOST_DEVICE float to_float(float value) { return value; }
DSV4_HOST_DEVICE float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

template <class T>
DSV4_HOST_DEVICE T from_float(float value);

template <>
DSV4_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
DSV4_HOST_DEVICE bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

// E4M3FN: 4 exponent bits (bias 7), 3 mantissa bits, no infinity. Saturates at 448; NaN becomes 0x7F.
DSV4_HOST_DEVICE uint8_t e4m3_from_float(float value) {
  const uint32_t sign = (bits_of(value) >> 24) & 0x80u;
  float size = magnitude(value);
  if (size != size) return 0x7F;
  size = size > kE4m3Max ? kE4m3Max : size;
  if (size < 0.015625f) {  // below 2^-6 codes are multiples of 2^-9
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(round_to_even(size * 512.0f)));
  }
  uint32_t bits = bits_of(size);
  bits += 0x7FFFFu + ((bits >> 20) & 1u);
  return static_cast<uint8_t>(sign | ((bits >> 20) - ((127u - 7u) << 3)));
}

#if defined(__CUDACC__)
// Two floats of the halves of a word, the first from the lower one.
__device__ __forceinline__ void floats_from_halves(uint32_t halves, float& first, float& second) {
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(first), "=f"(second)
      : "r"(halves));
}
#endif

#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890)
// Two E4M3 codes as halves, which hold every value of E4M3.
__device__ __forceinline__ uint32_t halves_from_e4m3x2(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}
#endif

DSV4_HOST_DEVICE float float_from_e4m3(uint8_t code) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  float value, unused;
  floats_from_halves(halves_from_e4m3x2(code), value, unused);
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t size = code & 0x7Fu;
  if (size == 0x7Fu) return float_of(0x7FC00000u);
  if (size < 8u) return float_of(sign | bits_of(static_cast<float>(size) * 0.001953125f));
  return float_of(sign | ((size << 20) + ((127u - 7u) << 23)));
#endif
}

// Two E4M3 codes, first value in the lower byte.
DSV4_HOST_DEVICE uint16_t e4m3x2_from_float(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
  return codes;
#else
  return static_cast<uint16_t>(e4m3_from_float(a) | (e4m3_from_float(b) << 8));
#endif
}

// E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign. Ties go to the even code, sizes above 6 saturate, NaN becomes +6.
DSV4_HOST_DEVICE uint32_t e2m1_from_float(float value) {
  const float size = min_ignoring_nan(kE2m1Max, magnitude(value));
  // Adding `shift`, whose unit in the last place is the distance of the codes around `size`, rounds to one of them.
  const uint32_t shift = (bits_of(max_ignoring_nan(1.0f, size)) & 0x7F800000u) + (22u << 23);
  const uint32_t code = bits_of(size + float_of(shift)) - shift + (shift >> 22) - 298u;
  return value != value ? code : code | ((bits_of(value) >> 28) & 8u);
}

DSV4_HOST_DEVICE float float_from_e2m1(uint32_t code) {
  const uint32_t size = code & 7u;
  const uint32_t sign = (code & 8u) << 28;
  if (size < 2u) return float_of(sign | (size == 1u ? 0x3F000000u : 0u));
  return float_of(sign | ((size << 22) + (126u << 23)));
}

// The exponent byte (UE8M0) of the smallest power of two that is not below `value`, a positive normal number.
DSV4_HOST_DEVICE uint8_t ceil_exponent(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint8_t>((bits >> 23) + ((bits & 0x7FFFFFu) != 0u));
}

DSV4_HOST_DEVICE float power_of_two(uint8_t exponent) { return float_of(static_cast<uint32_t>(exponent) << 23); }

// 1 / value for a power of two from 2^-126 to 2^126. A product with it and a quotient by `value` are the same number,
// rounded once.
DSV4_HOST_DEVICE float inverse_power_of_two(float value) { return float_of((254u << 23) - bits_of(value)); }

}  // namespace dsv4
