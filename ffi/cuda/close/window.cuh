// A closing window on the GPU: reading its rows, pooling them, and finishing the entry, four channels a thread (where
// decode needs less code a warp: two). Reductions over the threads of a row follow the balanced tree of
// ffi/math/pooling.h.
#pragma once

#include "cuda/core/warp_rows.cuh"
#include "layout/window_rows.h"
#include "math/pooling.h"

namespace dsv4::cuda {

// Waits for `threads` threads of the block that name the same barrier (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The threads that share a row, N neighbouring channels each, and how they exchange values. `thread` counts from 0
// within the row.
template <int W, int N = 4>
struct RowThreads {
  static constexpr int kThreads = W / N;
  static constexpr int kWarps = kThreads / kWarp;
  int thread;
  int barrier;
  float* scratch;  // shared memory, 2 * kWarps floats; unused by single-warp rows

  __device__ __forceinline__ int channel() const { return N * thread; }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      sync_threads(barrier, kThreads);
    }
  }

  __device__ __forceinline__ float sum(float leaf) const {
    return over_warps(scratch, sum_over_lanes(leaf), [](float a, float b) { return a + b; });
  }

  // Of values that are not below 0.
  __device__ __forceinline__ float max(float value) const {
    return over_warps(scratch + kWarps, max_over_lanes<kWarp>(value), max_ignoring_nan);
  }

 private:
  // A balanced tree over the warps.
  template <class Merge>
  __device__ __forceinline__ float over_warps(float* of_warps, float of_warp, Merge&& merge) const {
    if constexpr (kWarps == 1) return of_warp;
    if (thread % kWarp == 0) of_warps[static_cast<unsigned>(thread) / kWarp] = of_warp;
    sync();
    float values[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) values[i] = of_warps[i];
#pragma unroll
    for (int step = 1; step < kWarps; step *= 2) {
#pragma unroll
      for (int i = 0; i < kWarps; i += 2 * step) values[i] = merge(values[i], values[i + step]);
    }
    return values[0];
  }
};

constexpr int kRowThreads = RowThreads<kHeadDim>::kThreads;

// The compressor as this kernel knows it: width and ratio as constants, so that no address needs a division.
template <int W, int kRatio>
__device__ __forceinline__ Compressor with_constants(Compressor compressor) {
  compressor.tail.width = W;
  compressor.tail.geometry.ratio = kRatio;
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

// Rows 8 group .. 8 group + 7 of the window that token `index` closes, pooled. The same rows as window_row's, at
// addresses that differ by constants, and loaded without branches between, so that all of a group's loads are in flight
// together.
template <int W, int kRatio, class T>
__device__ __forceinline__ Partials<4> pool_rows(const Tail& tail, const Projections& in, int64_t layer,
                                                 const Token& closing, int index, int group, int channel) {
  constexpr bool kOverlaps = kRatio == kCsaRatio;
  constexpr int kRows = kOverlaps ? 2 * kRatio : kRatio, kColumns = kOverlaps ? 2 * W : W;
  const int back = kRows - 1 - group * kGroupRows, first = closing.position - back;
  const auto column = [&](int i) { return (kOverlaps && i >= kRatio ? W : 0) + channel; };

  float kv[kGroupRows][4], score[kGroupRows][4];
  const auto load_projection = [&](int i, int from) {
    const int64_t offset = static_cast<int64_t>(index - back) * kColumns + from * kColumns + column(from);
    load_values(static_cast<const T*>(in.kv) + offset, kv[i]);
    load_values(static_cast<const T*>(in.gate) + offset, score[i]);
  };
  const auto add_bias = [&](int i) {
    float ape[4];
    load_values(in.ape + (kOverlaps ? i % kRatio : group * kGroupRows + i) * kColumns + column(i), ape);
#pragma unroll
    for (int c = 0; c < 4; ++c) score[i][c] += ape[c];
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
    const float* rows = tail_row(tail, layer, closing.slot, 0, 0) + channel;
    const int previous =
        (closing.position + 1) % (2 * kRatio);  // where the ring of overlap halves has the window before
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      const int row = !kOverlaps ? group * kGroupRows + i : i < kRatio ? previous + i : kRatio + i;
      load_values(rows + row * W, kv[i]);
      load_values(rows + (tail.geometry.rows() + row) * W, score[i]);
    }
    if (first + kGroupRows > closing.start) {
#pragma unroll
      for (int i = 0; i < kGroupRows; ++i) {
        if (first + i < closing.start) continue;
        load_projection(i, i);
        add_bias(i);
      }
    }
  }
  if (kOverlaps && first < 0) {
#pragma unroll
    for (int i = 0; i < kRatio; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) kv[i][c] = 0.0f, score[i][c] = kNoScore;
    }
  }
  return pool_group(kv, score);
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
template <int W>
__device__ __forceinline__ void finish_csa_entry(const Compressor& compressor, const Finish& finish,
                                                 const Partials<4>& partial, const RowThreads<W>& threads,
                                                 float (&x)[4]) {
  pooled(partial, x);
  finish.apply<W>(x, threads.sum(square_sum(x)), compressor.eps, threads.channel());
  if constexpr (W == kKeyDim) {
    if (compressor.hadamard) hadamard_transform(x, threads.thread);
  }
}

// The CSA entry that token `index` closes, entry `row` of the step.
template <int W, class T>
__device__ __forceinline__ void csa_entry(const Compressor& compressor, int64_t layer, const Token& closing, int index,
                                          int row, const RowThreads<W>& threads, float (&x)[4]) {
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  const Finish finish =
      Finish::load<W>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, threads.channel());
  const Partials<4> partial =
      pool_rows<W, kCsaRatio, T>(compressor.tail, compressor.projections, layer, closing, index, 0, threads.channel());
  finish_csa_entry(compressor, finish, partial, threads, x);
}

// Four channels of what a token brings to a compressor: overlap half and current half, kv and gate.
struct TokenHalves {
  float kv[2][4];
  float gate[2][4];
};

template <class T>
__device__ __forceinline__ TokenHalves load_halves(const Tail& tail, const Projections& in, int index, int channel) {
  TokenHalves halves;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first_column = half == 0 ? 0 : in.columns - tail.width;  // one and the same without overlap
    const int64_t projection = static_cast<int64_t>(index) * in.columns + first_column + channel;
    load_values(static_cast<const T*>(in.kv) + projection, halves.kv[half]);
    load_values(static_cast<const T*>(in.gate) + projection, halves.gate[half]);
  }
  return halves;
}

// Keeps the halves of a token that later entries will pool.
__device__ __forceinline__ void store_halves(const Tail& tail, const Projections& in, int64_t layer, const Token& token,
                                             const TokenHalves& halves, int channel) {
  const TailGeometry& geometry = tail.geometry;
  const auto write = [&](int half, int row, int first_column) {
    float ape[4], score[4];
    load_values(in.ape + static_cast<int64_t>(token.position % geometry.ratio) * in.columns + first_column + channel,
                ape);
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = halves.gate[half][i] + ape[i];
    store_values(tail_row(tail, layer, token.slot, 0, row) + channel, halves.kv[half]);
    store_values(tail_row(tail, layer, token.slot, 1, row) + channel, score);
  };
  if (geometry.overlap_survives(token.position, token.next)) write(0, geometry.overlap_row(token.position), 0);
  if (geometry.current_survives(token.position, token.next)) {
    write(1, geometry.current_row(token.position), in.columns - tail.width);
  }
}

template <class T>
__device__ __forceinline__ void append_token(const Tail& tail, const Projections& in, int64_t layer, const Token& token,
                                             int index, int channel) {
  store_halves(tail, in, layer, token, load_halves<T>(tail, in, index, channel), channel);
}

}  // namespace dsv4::cuda
