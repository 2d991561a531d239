// Queries as the second operand of Hopper's products: transformed where keys are, rounded, and put where keys want
// them.
#pragma once

#include "cuda/index/keys.cuh"
#include "math/index.h"

namespace dsv4::cuda::index {

// Bytes of a token's queries as the second operand: 64 rows (heads) of 128 channels.
template <class Keys>
constexpr int kQueryBytes = 64 * kKeyDim * Keys::kBytes;

// Rounds a row (head) that kLanes neighbouring lanes have, N = 128 / kLanes neighbouring channels each, and stores it.
// Returns its scale. The same numbers as round_query's: butterflies come in the same order.
template <class Keys, int N>
__device__ __forceinline__ float store_query(float (&x)[N], bool hadamard, uint8_t* rows, int row, int part) {
  constexpr int kLanes = kKeyDim / N;
  if (hadamard) {
#pragma unroll
    for (int step = 1; step < N; step *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if ((i & step) == 0) {
          const float a = x[i], b = x[i + step];
          x[i] = a + b, x[i + step] = a - b;
        }
      }
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float other = __shfl_xor_sync(kAll, x[i], step);
        x[i] = (part & step) != 0 ? other - x[i] : x[i] + other;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= kHadamardScale;
  }
  float scale = 1.0f;
  if constexpr (!Keys::kPlain) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, step));
    const uint32_t exponent = query_exponent(query_form<typename Keys::Codec>(), amax);
    scale = __uint_as_float(exponent << 23);
    const float inverse = __uint_as_float((254u - exponent) << 23);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= inverse;
  }
  // Blocks of 128 bytes of a row lie 64 rows apart; within one, 16-byte chunks are swizzled by the row.
  const auto put = [&](int offset, uint32_t word) {
    *reinterpret_cast<uint32_t*>(rows + offset / 128 * 8192 + row * 128 + ((offset % 128) ^ ((row & 7) << 4))) = word;
  };
#pragma unroll
  for (int i = 0; i < N; i += 8) {
    const int dim = part * N + i;
    if constexpr (Keys::kBytes == 1) {
#pragma unroll
      for (int h = 0; h < 8; h += 4) {
        const uint32_t low = e4m3x2_from_float(x[i + h], x[i + h + 1]);
        const uint32_t high = e4m3x2_from_float(x[i + h + 2], x[i + h + 3]);
        put(Keys::offset_of(dim + h), low | high << 16);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        // The two channels of a word.
        const int first = Keys::kApart == 1 ? 2 * h : h;
        const float a = x[i + first], b = x[i + first + Keys::kApart];
        uint32_t word;
        if constexpr (query_form<typename Keys::Codec>() == QueryForm::kE4m3) {
          word = halves_from_e4m3x2(e4m3x2_from_float(a, b));
        } else if constexpr (Keys::kPlain) {
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
        } else {
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
          word = times_halves(word, kHalvesOf128);  // beside keys that are so much smaller
        }
        put(Keys::offset_of(dim + first), word);
      }
    }
  }
  return scale;
}

// What a thread of kThreads reads of a token's queries, 128 * 64 / kThreads channels of a head, and the head's weight.
// Heads that the model lacks are zeros.
template <int kThreads>
struct RawQuery {
  static constexpr int kLanes = kThreads / 64, kChannels = kKeyDim / kLanes;
  uint4 words[kChannels / 4];  // the first half of it if queries are bf16
  float weight;
};

template <int kThreads>
__device__ __forceinline__ RawQuery<kThreads> load_query(const IndexTopkParams& params, int token) {
  constexpr int kLanes = RawQuery<kThreads>::kLanes, N = RawQuery<kThreads>::kChannels;
  const int head = threadIdx.x / kLanes, part = threadIdx.x % kLanes;
  RawQuery<kThreads> raw;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) raw.words[i] = make_uint4(0u, 0u, 0u, 0u);
  raw.weight = 0.0f;
  if (head < params.heads) {
    const int64_t row = static_cast<int64_t>(token) * params.heads + head, first = row * kKeyDim + part * N;
    const bool floats = params.element == Element::kFloat32;
    const auto* from =
        reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(params.queries) + first * (floats ? 4 : 2));
#pragma unroll
    for (int i = 0; i < N / 8; ++i) raw.words[i] = from[i];
    if (floats) {
#pragma unroll
      for (int i = N / 8; i < N / 4; ++i) raw.words[i] = from[i];
    }
    raw.weight = params.head_weights[row];
  }
  return raw;
}

// A token's queries and head weights (their scales included) into `rows` and `weights`, by kThreads threads.
template <class Keys, int kThreads>
__device__ __forceinline__ void prepare(const IndexTopkParams& params, const RawQuery<kThreads>& raw, uint8_t* rows,
                                        float* weights) {
  constexpr int kLanes = RawQuery<kThreads>::kLanes, N = RawQuery<kThreads>::kChannels;
  const int head = threadIdx.x / kLanes, part = threadIdx.x % kLanes;
  float x[N];
  if (params.element == Element::kFloat32) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __uint_as_float(word_of(raw.words[i / 4], i % 4));
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint32_t two = word_of(raw.words[i / 8], i % 8 / 2);
      x[i] = __uint_as_float(two << 16), x[i + 1] = __uint_as_float(two & 0xFFFF0000u);
    }
  }
  const float scale = store_query<Keys, N>(x, params.hadamard, rows, head, part);
  if (part == 0) weights[head] = raw.weight * scale;
}

// A token's, prepared once where several blocks want them.
template <class Keys>
struct Prepared {
  uint8_t queries[kQueryBytes<Keys>];
  float weights[64];
};

constexpr int kPrepareThreads = 256;

// A block a token, 256 threads, no shared memory.
template <class Keys>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ IndexTopkParams params, int first_token) {
  static_assert(sizeof(Prepared<Keys>) <= kPreparedBytes && sizeof(Prepared<Keys>) % 16 == 0);
  auto& to = reinterpret_cast<Prepared<Keys>*>(params.prepared)[blockIdx.x];
  const auto raw = load_query<kPrepareThreads>(params, first_token + blockIdx.x);
  prepare<Keys, kPrepareThreads>(params, raw, to.queries, to.weights);
}

}  // namespace dsv4::cuda::index
