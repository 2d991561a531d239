// One row in and out of its stored form by one warp: lane l holds channels 128 q + 4 l .. + 3 of quad q.
#pragma once

#include "layout/codecs.h"
#include "ops/params.h"

namespace dsv4::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kQuadChannels = 4 * kWarp;

// A row spread over a warp.
template <int W>
struct WarpRow {
  static constexpr int kQuads = W / kQuadChannels;
  float x[kQuads][4];
};

__device__ __forceinline__ int channel_of(int quad, int lane) { return quad * kQuadChannels + 4 * lane; }

// Loads and stores neighbouring channels, all of a thread's in one access.
__device__ __forceinline__ void load_values(const float* from, float (&x)[2]) {
  const float2 two = *reinterpret_cast<const float2*>(from);
  x[0] = two.x, x[1] = two.y;
}

__device__ __forceinline__ void load_values(const float* from, float (&x)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

__device__ __forceinline__ void load_values(const bfloat16* from, float (&x)[2]) {
  const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
  x[0] = float_of(two << 16), x[1] = float_of(two & 0xFFFF0000u);
}

__device__ __forceinline__ void load_values(const bfloat16* from, float (&x)[4]) {
  const uint2 four = *reinterpret_cast<const uint2*>(from);
  x[0] = float_of(four.x << 16), x[1] = float_of(four.x & 0xFFFF0000u);
  x[2] = float_of(four.y << 16), x[3] = float_of(four.y & 0xFFFF0000u);
}

template <class T, int N>
__device__ __forceinline__ void store_values(T* to, const float (&x)[N]) {
  alignas(N * sizeof(T)) T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = from_float<T>(x[i]);
  copy_words<sizeof values>(to, values);
}

// The largest value among groups of `kLanes` neighbouring lanes, known to each of them; none is below 0.
template <int kLanes>
__device__ __forceinline__ float max_over_lanes(float value) {
  if constexpr (kLanes == kWarp) {
    return float_of(__reduce_max_sync(kAllLanes, bits_of(value)));  // such floats are ordered like their bits
  } else {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      value = max_ignoring_nan(value, __shfl_xor_sync(kAllLanes, value, step));
    }
    return value;
  }
}

// A balanced tree over neighbouring lanes.
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) value = value + __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// The amax of N neighbouring channels, 0 where they are not quantized.
template <class Codec, int N>
__device__ __forceinline__ float amax_of(const float (&x)[N], int channel) {
  float amax = 0.0f;
  if constexpr (Codec::kQuantized != 0) {
    if (channel >= Codec::kQuantized) return amax;
#pragma unroll
    for (int i = 0; i < N; ++i) amax = max_ignoring_nan(amax, magnitude(x[i]));
  }
  return min_ignoring_nan(kFloatMax, amax);
}

// Stores N (2 or 4) channels and, by the first lane of a block, its scale. All lanes of the warp call this together.
template <class Codec, int N>
__device__ __forceinline__ void store_scaled(StoredRow stored, const float (&x)[N], int channel, float amax,
                                             float row_scale) {
  float scale = row_scale;
  if constexpr (Codec::kBlock != 0) {
    const float block_amax = max_over_lanes<Codec::kBlock / N>(amax);
    if (channel < Codec::kQuantized) {
      const uint8_t code = Codec::block_code(block_amax, row_scale);
      const unsigned place = channel;  // unsigned, which needs fewer registers
      if (place % Codec::kBlock == 0) stored.scales[place / Codec::kBlock] = code;
      scale = Codec::scale(code, row_scale);
    }
  }
  store_channels<Codec>(stored.data, channel, x, scale);
}

template <class Codec>
__device__ __forceinline__ void store_row(StoredRow stored, const WarpRow<Codec::kWidth>& row, int lane,
                                          float global_scale) {
  constexpr int kQuads = WarpRow<Codec::kWidth>::kQuads;
  float amax[kQuads], row_amax = 0.0f;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    amax[q] = amax_of<Codec>(row.x[q], channel_of(q, lane));
    row_amax = max_ignoring_nan(row_amax, amax[q]);
  }
  if constexpr (Codec::kNeedsRowAmax) row_amax = max_over_lanes<kWarp>(row_amax);
  const float row_scale = Codec::row_scale(row_amax, global_scale);
  if (lane == 0) store_row_scale<Codec>(stored.scales, row_scale);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) store_scaled<Codec>(stored, row.x[q], channel_of(q, lane), amax[q], row_scale);
}

// Reads a stored row and writes it to `to`, dense.
template <class Codec, class T>
__device__ __forceinline__ void load_row(StoredRow stored, T* to, int lane, float global_scale) {
  constexpr int kQuads = WarpRow<Codec::kWidth>::kQuads;
  WarpRow<Codec::kWidth> row;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int channel = channel_of(q, lane);
    load_channels<Codec>(stored.data, channel, row.x[q], load_scale<Codec>(stored.scales, channel, global_scale));
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) store_values(to + channel_of(q, lane), row.x[q]);
}

}  // namespace dsv4::cuda
