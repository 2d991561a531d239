// The indexer's arithmetic apart from its sums: how queries are rounded for keys of a codec, what a token may choose
// from, and the order in which it chooses. dsv4_jax/ops/index/reference.py says the same in jnp.
#pragma once

#include "layout/codecs.h"
#include "math/pooling.h"
#include "ops/params.h"

namespace dsv4 {

// What queries are rounded to: what a product with keys of the codec can take without loss.
enum class QueryForm { kFloat, kBFloat16, kE4m3, kHalf };

template <class Codec>
constexpr QueryForm query_form() {
  if (Codec::kQuantized == 0) {
    return std::is_same_v<typename Codec::Plain, float> ? QueryForm::kFloat : QueryForm::kBFloat16;
  }
  return Codec::kCodeBits == 4 && Codec::kBlock == 16 ? QueryForm::kHalf : QueryForm::kE4m3;
}

// The exponent byte of a rounded query's scale: of the power of two that makes a row whose largest size is `amax` at
// most 1, as halves at most 1/8. So no product of a row with a key's codes exceeds what a half holds.
DSV4_HOST_DEVICE uint32_t query_exponent(QueryForm form, float amax) {
  constexpr float kSmallest = 1e-4f, kLargest = 1.329227995784916e36f;  // 2^120
  return ceil_exponent(clamp(amax, kSmallest, kLargest)) + (form == QueryForm::kHalf ? 3u : 0u);
}

// A float rounded to a half's precision, for |x| <= 2^15.
DSV4_HOST_DEVICE float rounded_to_half(float x) {
  const float size = magnitude(x);
  if (!(size >= 6.103515625e-05f)) {                // below 2^-14 halves are multiples of 2^-24
    return size != size ? x : (x + 0.75f) - 0.75f;  // 0.75: its unit in the last place is 2^-24
  }
  const uint32_t bits = bits_of(x);
  return float_of((bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu);
}

// One channel of a query, in units of its scale, rounded.
DSV4_HOST_DEVICE float rounded_query(QueryForm form, float x) {
  switch (form) {
    case QueryForm::kBFloat16:
      return to_float(from_float<bfloat16>(x));
    case QueryForm::kE4m3:
      return float_from_e4m3(static_cast<uint8_t>(e4m3x2_from_float(x, 0.0f)));
    case QueryForm::kHalf:
      return rounded_to_half(x);
    default:
      return x;
  }
}

// Rounds a head's query in place, Hadamard-transformed first where keys are, and returns its scale.
DSV4_HOST_DEVICE float round_query(QueryForm form, float (&x)[kKeyDim], bool hadamard) {
  if (hadamard) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int step = 1; step < kKeyDim; step *= 2) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
      for (int i = 0; i < kKeyDim; ++i) {
        if ((i & step) == 0) {
          const float a = x[i], b = x[i + step];
          x[i] = a + b, x[i + step] = a - b;
        }
      }
    }
    for (int i = 0; i < kKeyDim; ++i) x[i] *= kHadamardScale;
  }
  uint32_t exponent = 127;
  if (form == QueryForm::kE4m3 || form == QueryForm::kHalf) {
    float amax = 0.0f;
    for (int i = 0; i < kKeyDim; ++i) amax = max_ignoring_nan(amax, magnitude(x[i]));
    exponent = query_exponent(form, amax);
  }
  const float inverse = power_of_two(static_cast<uint8_t>(254u - exponent));
  for (int i = 0; i < kKeyDim; ++i) x[i] = rounded_query(form, x[i] * inverse);
  return power_of_two(static_cast<uint8_t>(exponent));
}

// How many entries a token sees; 0 for padding.
DSV4_HOST_DEVICE int entries_seen(const IndexTopkParams& params, int64_t token) {
  const int slot = params.plan.token_slot()[token], position = params.plan.token_position()[token];
  if (slot < 0 || slot >= params.table.slots || position < 0) return 0;
  const int entries = (position + 1) / params.ratio;
  const int places = params.table.max_blocks * params.pool.rows;
  return entries < places ? entries : places;
}

// A token that sees no more than it may choose takes all, whatever they score.
DSV4_HOST_DEVICE bool needs_scores(const IndexTopkParams& params, int entries) {
  return entries > params.k || params.scores != nullptr;
}

// Numbers from 1 on in the order of scores, both zeros being one; NaN comes below all.
DSV4_HOST_DEVICE uint32_t ordered_score(float score) {
  if (score != score) return 1u;
  const uint32_t bits = score == 0.0f ? 0u : bits_of(score);
  return bits ^ ((bits >> 31) != 0u ? 0xFFFFFFFFu : 0x80000000u);
}

// Larger is chosen first: by ordered score, then the lower id.
DSV4_HOST_DEVICE uint64_t choice_key(uint32_t ordered, int entry) {
  return static_cast<uint64_t>(ordered) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(entry));
}
DSV4_HOST_DEVICE int entry_of_choice(uint64_t key) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

}  // namespace dsv4
