// A closing window on the GPU: reading its rows, pooling them, and finishing the entry, four channels a thread (where
// decode needs less code a warp: two).
#pragma once

#include "cuda/core/early_loads.cuh"
#include "cuda/core/row_threads.cuh"
#include "layout/window_rows.h"
#include "math/pooling.h"

namespace dsv4::cuda {

// The compressor as this kernel knows it: width and ratio as constants, so that addresses need no divisions; the depth
// of the tail's rings too, unless they are deep (then a row costs a division).
template <int W, int kRatio, bool kDeep = true>
__device__ __forceinline__ Compressor with_constants(Compressor compressor) {
  compressor.tail.width = W;
  compressor.tail.geometry.ratio = kRatio;
  if (!kDeep) compressor.tail.geometry.depth = 0;
  compressor.projections.columns = kRatio == kCsaRatio ? 2 * W : W;
  return compressor;
}

// N channels of a partly pooled window.
template <int N>
struct alignas(4 * N) Partials {
  float max[N];
  float denominator[N];
  float sum[N];

  __device__ __forceinline__ SoftmaxPartial operator[](int i) const { return {max[i], denominator[i], sum[i]}; }
  __device__ __forceinline__ void set(int i, const SoftmaxPartial& one) {
    max[i] = one.max, denominator[i] = one.denominator, sum[i] = one.sum;
  }
};

template <int N>
__device__ __forceinline__ Partials<N> merge(const Partials<N>& a, const Partials<N>& b) {
  Partials<N> merged;
#pragma unroll
  for (int i = 0; i < N; ++i) merged.set(i, merge(a[i], b[i]));
  return merged;
}

// Pools eight rows.
template <int N>
__device__ __forceinline__ Partials<N> pool_group(const float (&kv)[kGroupRows][N],
                                                  const float (&score)[kGroupRows][N]) {
  Partials<N> partials;
#pragma unroll
  for (int c = 0; c < N; ++c) {
    float kv_of[kGroupRows], score_of[kGroupRows];
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) kv_of[i] = kv[i][c], score_of[i] = score[i][c];
    partials.set(c, dsv4::pool_group(kv_of, score_of));
  }
  return partials;
}

template <int N>
__device__ __forceinline__ void pooled(const Partials<N>& partials, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = pooled(partials[i]);
}

// Rows 8 group .. 8 group + 7 of the window that token `index` closes, pooled. The same rows as window_row's. Its rows
// of the tail, which may come from far, are all in flight before anything is waited for, and so are its rows of the
// step where it has no others.
template <int W, int kRatio, class T, int N>
__device__ __forceinline__ Partials<N> pool_rows(const Tail& tail, const Projections& in, int64_t layer,
                                                 const Token& closing, int index, int group, int channel) {
  constexpr bool kOverlaps = kRatio == kCsaRatio;
  constexpr int kRows = kOverlaps ? 2 * kRatio : kRatio, kColumns = kOverlaps ? 2 * W : W;
  const int back = kRows - 1 - group * kGroupRows, first = closing.position - back;
  const auto column = [&](int i) { return (kOverlaps && i >= kRatio ? W : 0) + channel; };

  float kv[kGroupRows][N], score[kGroupRows][N];
  const auto load_projection = [&](int i, int from) {
    const int64_t offset = static_cast<int64_t>(index - back) * kColumns + from * kColumns + column(from);
    load_values(static_cast<const T*>(in.kv) + offset, kv[i]);
    load_values(static_cast<const T*>(in.gate) + offset, score[i]);
  };
  const auto add_bias = [&](int i) {
    float bias[N];
    load_values(in.position_bias + (kOverlaps ? i % kRatio : group * kGroupRows + i) * kColumns + column(i), bias);
#pragma unroll
    for (int c = 0; c < N; ++c) score[i][c] += bias[c];
  };

  if (first >= closing.start || (first < 0 && closing.start == 0)) {
    // The whole group came with this step; in place of rows before the first token, its last row.
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      if (kOverlaps && first < 0 && i < kRatio) {
        load_projection(i, kGroupRows - 1);
      } else {
        load_projection(i, i);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) add_bias(i);
  } else {
    const TailGeometry& geometry = tail.geometry;
    const float* rows = tail_row(tail, layer, closing.slot, 0, 0) + channel;
    const int scores = geometry.rows() * W;  // from a tail row to its scores
    // Where the rings have the group's first row, with overlap that of each half's four. A window of four lies in one
    // piece; eight of 128 rows may begin anew in a deep ring. (The window before, counted around the ring: it need not
    // be there.)
    const int depth = geometry.depth, ring = geometry.current_ring();
    const int previous = static_cast<unsigned>(closing.position + 1 + depth) % (2u * kRatio + depth);
    const int current = depth == 0 ? (kOverlaps ? 0 : group * kGroupRows)
                                   : static_cast<unsigned>(kOverlaps ? closing.position + 1 - kRatio : first) % ring;
    const int from_tail = closing.start - first;  // rows; those behind came with this step
    const float* const overlap_rows = rows + previous * W;
    const float* const current_rows = rows + (geometry.overlap_ring() + current) * W;
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      if (i < from_tail) {
        const float* row =
            kOverlaps && i < kRatio ? overlap_rows + i * W : current_rows + (kOverlaps ? i - kRatio : i) * W;
        if (!kOverlaps && depth != 0 && current + i >= ring) row -= ring * W;
        load_values(row, kv[i]);
        load_values(row + scores, score[i]);
      } else {
        load_projection(i, i);
        add_bias(i);
      }
    }
  }
  if (kOverlaps && first < 0) {
#pragma unroll
    for (int i = 0; i < kRatio; ++i) {
#pragma unroll
      for (int c = 0; c < N; ++c) kv[i][c] = 0.0f, score[i][c] = kNoScore;
    }
  }
  return pool_group(kv, score);
}

__device__ __forceinline__ void hadamard_transform(float (&x)[4], const RowThreads<kKeyDim, 4>& threads) {
  const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const bool high = (threads.thread & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] = high ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= kHadamardScale;
}

__device__ __forceinline__ void hadamard_transform(float (&x)[2], const RowThreads<kKeyDim, 2>& threads) {
  const float a = x[0] + x[1], b = x[0] - x[1];
  x[0] = a, x[1] = b;
  const auto step = [&](bool high, int i, float other) { x[i] = high ? other - x[i] : x[i] + other; };
#pragma unroll
  for (int lane = 1; lane < kWarp; lane *= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) step((threads.thread & lane) != 0, i, __shfl_xor_sync(kAllLanes, x[i], lane));
  }
  __shared__ float values[2][kKeyDim / 2];  // a row's next transform comes behind a barrier of the row
#pragma unroll
  for (int i = 0; i < 2; ++i) values[i][threads.thread] = x[i];
  threads.sync();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    step(threads.thread >= kWarp, i, values[i][threads.thread ^ kWarp]);
    x[i] *= kHadamardScale;
  }
}

// What finishes N channels of a row: norm weights, and the angles of its pairs where RoPE applies. Loaded early, to be
// there when the row is pooled.
template <int N>
struct FinishOf {
  float weight[N];
  float cos[N / 2];
  float sin[N / 2];

  template <int W>
  __device__ __forceinline__ static FinishOf load(const float* norm_weight, const float* cos, const float* sin,
                                                  unsigned channel) {
    FinishOf finish{};
    load_early(norm_weight + channel, finish.weight);
    finish.template load_angles<W>(cos, sin, channel);
    return finish;
  }

  template <int W>
  __device__ __forceinline__ void load_angles(const float* cos_row, const float* sin_row, unsigned channel) {
    if (channel < W - kRopeDim) return;
    const unsigned pair = (channel - (W - kRopeDim)) / 2;
    load_early(cos_row + pair, cos);
    load_early(sin_row + pair, sin);
  }

  // RMSNorm and RoPE, the row's sum of squares being known.
  template <int W>
  __device__ __forceinline__ void apply(float (&x)[N], float sum_of_squares, float eps, int channel) const {
    const float inverse = inverse_rms(sum_of_squares, W, eps);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] * inverse * weight[i];
    if (channel >= W - kRopeDim) rotate_pairs(x, cos, sin, 0);
  }
};

using Finish = FinishOf<4>;

// A CSA entry from its pooled rows.
template <int W, int N>
__device__ __forceinline__ void finish_csa_entry(const Compressor& compressor, const FinishOf<N>& finish,
                                                 const Partials<N>& partial, const RowThreads<W, N>& threads,
                                                 float (&x)[N]) {
  pooled(partial, x);
  finish.template apply<W>(x, threads.sum(square_sum(x)), compressor.eps, threads.channel());
  if constexpr (W == kKeyDim) {
    if (compressor.hadamard) hadamard_transform(x, threads);
  }
}

// The CSA entry that token `index` closes, entry `row` of the step.
template <class T, int W, int N>
__device__ __forceinline__ void csa_entry(const Compressor& compressor, int64_t layer, const Token& closing, int index,
                                          int row, const RowThreads<W, N>& threads, float (&x)[N]) {
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  const Partials<N> partial = pool_rows<W, kCsaRatio, T, N>(compressor.tail, compressor.projections, layer, closing,
                                                            index, 0, threads.channel());
  // Behind the rows, whose registers are many.
  const auto finish = FinishOf<N>::template load<W>(compressor.norm_weight, compressor.cos + angles,
                                                    compressor.sin + angles, threads.channel());
  finish_csa_entry(compressor, finish, partial, threads, x);
}
}  // namespace dsv4::cuda
