// A closing window on the GPU: reading its rows, pooling them, and finishing the entry, four channels a thread.
//
// A row is spread over W / 4 neighbouring threads: one warp for indexer keys, four for entries. Reductions over a row follow
// the balanced tree of ffi/common/pooling.h.
#pragma once

#include "../common/pooling.h"
#include "../common/window_rows.h"
#include "warp_rows.cuh"

namespace dsv4::cuda {

constexpr int kMaxBarrier = 16;

// Waits for `threads` threads of the block that name the same barrier (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The threads that share a row, and how they exchange values. `thread` counts from 0 within the row.
template <int W>
struct RowThreads {
  static constexpr int kThreads = W / 4;
  static constexpr int kWarps = kThreads / kWarp;
  int thread;
  int barrier;
  float* scratch;  // shared memory, 2 * kWarps floats; unused by single-warp rows

  __device__ __forceinline__ int channel() const { return 4 * thread; }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      sync_threads(barrier, kThreads);
    }
  }

  __device__ __forceinline__ float sum(float leaf) const {
    const float of_warp = sum_over_lanes(leaf);
    if constexpr (kWarps == 1) return of_warp;
    exchange(scratch, of_warp);
    return (scratch[0] + scratch[1]) + (scratch[2] + scratch[3]);
  }

  __device__ __forceinline__ float max(float value) const {
    const float of_warp = max_over_lanes<kWarp>(value);
    if constexpr (kWarps == 1) return of_warp;
    exchange(scratch + kWarps, of_warp);
    const float* of_warps = scratch + kWarps;
    return max_ignoring_nan(max_ignoring_nan(of_warps[0], of_warps[1]), max_ignoring_nan(of_warps[2], of_warps[3]));
  }

 private:
  __device__ __forceinline__ void exchange(float* of_warps, float of_warp) const {
    static_assert(kWarps == 1 || kWarps == 4, "one or four warps a row");
    if (thread % kWarp == 0) of_warps[thread / kWarp] = of_warp;
    sync();
  }
};

// Four channels of a partly pooled window.
struct Partial4 {
  SoftmaxPartial channel[4];
};

__device__ __forceinline__ Partial4 merge4(const Partial4& a, const Partial4& b) {
  Partial4 merged;
#pragma unroll
  for (int i = 0; i < 4; ++i) merged.channel[i] = merge(a.channel[i], b.channel[i]);
  return merged;
}

// Rows 8 group .. 8 group + 7 of the window that token `index` closes, pooled.
template <class T>
__device__ __forceinline__ Partial4 pool_rows(const Tail& tail, const Projections& in, int64_t layer, const Token& closing,
                                              int index, int group, int channel) {
  float kv[kGroupRows][4], score[kGroupRows][4];
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    const WindowRow from = window_row(tail, in.columns, closing, index, group * kGroupRows + i);
    if (from.source == WindowRow::kStep) {
      load_four(static_cast<const T*>(in.kv) + from.projection + channel, kv[i]);
      load_four(static_cast<const T*>(in.gate) + from.projection + channel, score[i]);
    } else if (from.source == WindowRow::kTail) {
      load_four(tail_row(tail, layer, closing.slot, 0, from.tail_row) + channel, kv[i]);
      load_four(tail_row(tail, layer, closing.slot, 1, from.tail_row) + channel, score[i]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) kv[i][c] = 0.0f, score[i][c] = kClearedScore;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    const WindowRow from = window_row(tail, in.columns, closing, index, group * kGroupRows + i);
    if (from.source != WindowRow::kStep) continue;
    float ape[4];
    load_four(in.ape + from.ape + channel, ape);
#pragma unroll
    for (int c = 0; c < 4; ++c) score[i][c] += ape[c];
  }
  Partial4 partial;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float kv_of[kGroupRows], score_of[kGroupRows];
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) kv_of[i] = kv[i][c], score_of[i] = score[i][c];
    partial.channel[c] = pool_group(kv_of, score_of);
  }
  return partial;
}

__device__ __forceinline__ void hadamard_transform(float (&x)[4], int lane) {
  const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const bool high = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] = high ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= kHadamardScale;
}

// RMSNorm and RoPE of a row; `cos` and `sin` are those of its position.
template <int W>
__device__ __forceinline__ void normalize(float (&x)[4], const RowThreads<W>& row, const float* norm_weight, const float* cos,
                                          const float* sin, float eps) {
  float weight[4];
  load_four(norm_weight + row.channel(), weight);
  const float inverse = inverse_rms(row.sum(square_sum(x)), W, eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = x[i] * inverse * weight[i];
  if (row.channel() >= W - kRopeDim) rotate_pairs(x, cos, sin, (row.channel() - (W - kRopeDim)) / 2);
}

// The finished entry of a pooled window.
template <int W>
__device__ __forceinline__ void finish(float (&x)[4], const Partial4& partial, const RowThreads<W>& row,
                                       const float* norm_weight, const float* cos, const float* sin, float eps,
                                       bool hadamard) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = pooled(partial.channel[i]);
  normalize(x, row, norm_weight, cos, sin, eps);
  if constexpr (W == kKeyDim) {
    if (hadamard) hadamard_transform(x, row.thread);
  }
}

// Keeps the halves of token `index` that later entries will pool, four channels of each.
template <class T>
__device__ __forceinline__ void append_token(const Tail& tail, const Projections& in, int64_t layer, const Token& token,
                                             int index, int channel) {
  const TailGeometry& geometry = tail.geometry;
  const auto write = [&](int row, int first_column) {
    const int64_t projection = static_cast<int64_t>(index) * in.columns + first_column + channel;
    float kv[4], score[4], ape[4];
    load_four(static_cast<const T*>(in.kv) + projection, kv);
    load_four(static_cast<const T*>(in.gate) + projection, score);
    load_four(in.ape + static_cast<int64_t>(token.position % geometry.ratio) * in.columns + first_column + channel, ape);
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] += ape[i];
    store_four(tail_row(tail, layer, token.slot, 0, row) + channel, kv);
    store_four(tail_row(tail, layer, token.slot, 1, row) + channel, score);
  };
  if (geometry.overlap_survives(token.position, token.next)) write(geometry.overlap_row(token.position), 0);
  if (geometry.current_survives(token.position, token.next)) {
    write(geometry.current_row(token.position), in.columns - tail.width);
  }
}

// Stores a row spread over its threads.
template <class Codec, int kAlignment>
__device__ __forceinline__ void store_spread_row(StoredRow stored, const float (&x)[4], const RowThreads<Codec::kWidth>& row,
                                                 float global_scale) {
  const float amax = quad_amax<Codec>(x, row.channel());
  float row_amax = 0.0f;
  if constexpr (Codec::kNeedsRowAmax) row_amax = row.max(amax);
  const float row_scale = Codec::row_scale(row_amax, global_scale);
  if (row.thread == 0) store_row_scale<Codec>(stored.scales, row_scale);
  store_quad<Codec, kAlignment>(stored, x, row.channel(), amax, row_scale);
}

}  // namespace dsv4::cuda
