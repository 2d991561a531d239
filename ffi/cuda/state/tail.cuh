// What the tokens of a step leave in a tail, N channels a thread: a token's halves in the rings, which every op that
// writes a tail row by row goes through. (A running tail is close/running.cuh's.)
#pragma once

#include "cuda/core/warp_rows.cuh"
#include "layout/window_rows.h"

namespace dsv4::cuda {

// N channels of what a token brings to a compressor: overlap half and current half, kv and gate.
template <int N>
struct TokenHalves {
  float kv[2][N];
  float gate[2][N];
};

template <class T, int N>
__device__ __forceinline__ TokenHalves<N> load_halves(const Tail& tail, const Projections& in, int index, int channel) {
  TokenHalves<N> halves;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first_column = half == 0 ? 0 : in.columns - tail.width;  // one and the same without overlap
    const int64_t projection = static_cast<int64_t>(index) * in.columns + first_column + channel;
    load_values(static_cast<const T*>(in.kv) + projection, halves.kv[half]);
    load_values(static_cast<const T*>(in.gate) + projection, halves.gate[half]);
  }
  return halves;
}

// Keeps the halves of a token that later entries will pool, or may after the request went back.
template <int N>
__device__ __forceinline__ void store_halves(const Tail& tail, const Projections& in, int64_t layer, const Token& token,
                                             const TokenHalves<N>& halves, int channel) {
  const TailGeometry& geometry = tail.geometry;
  const auto write = [&](int half, int row, int first_column) {
    float position_bias[N], score[N];
    load_values(
        in.position_bias + static_cast<int64_t>(token.position % geometry.ratio) * in.columns + first_column + channel,
        position_bias);
#pragma unroll
    for (int i = 0; i < N; ++i) score[i] = halves.gate[half][i] + position_bias[i];
    store_values(tail_row(tail, layer, token.slot, 0, row) + channel, halves.kv[half]);
    store_values(tail_row(tail, layer, token.slot, 1, row) + channel, score);
  };
  if (geometry.overlap_survives(token.position, token.next)) write(0, geometry.overlap_row(token.position), 0);
  if (geometry.current_survives(token.position, token.next)) {
    write(1, geometry.current_row(token.position), in.columns - tail.width);
  }
}

template <class T, int N>
__device__ __forceinline__ void append_token(const Tail& tail, const Projections& in, int64_t layer, const Token& token,
                                             int index, int channel) {
  store_halves(tail, in, layer, token, load_halves<T, N>(tail, in, index, channel), channel);
}

// Moves N channels of a request's tail on, kAtOnce tokens' loads in flight together; of kThreads threads each takes
// every kThreads-th token. `any` is a token of the request, number `index` of the step.
template <class T, int kThreads, int kAtOnce, int N>
__device__ __forceinline__ void move_tail_on(const Tail& tail, const Projections& in, int64_t layer, const Token& any,
                                             int index, int thread, int channel) {
  const TailGeometry& geometry = tail.geometry;
  const int window = geometry.earliest_window(any.next) - (geometry.overlaps() ? 1 : 0);  // the first to be kept
  const int first = max(any.start, window * geometry.ratio);
  for (int position = first + thread; position < any.next; position += kAtOnce * kThreads) {
    TokenHalves<N> halves[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = min(position + i * kThreads, any.next - 1);
      halves[i] = load_halves<T, N>(tail, in, index + at - any.position, channel);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = position + i * kThreads;
      if (at >= any.next) continue;
      const Token token{true, any.slot, at, any.start, any.next};
      store_halves(tail, in, layer, token, halves[i], channel);
    }
  }
}

}  // namespace dsv4::cuda
