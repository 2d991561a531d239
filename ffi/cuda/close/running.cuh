// The running tail on the GPU: channels of a window's state, and tokens folded into it one after the other.
#pragma once

#include "cuda/close/window.cuh"

namespace dsv4::cuda {

template <int N>
__device__ __forceinline__ Partials<N> empty_partials() {
  Partials<N> empty;
#pragma unroll
  for (int i = 0; i < N; ++i) empty.set(i, {kEmptyPartial.max, kEmptyPartial.denominator, kEmptyPartial.sum});
  return empty;
}

template <int N>
__device__ __forceinline__ Partials<N> fold(const Partials<N>& open, const float (&kv)[N], const float (&score)[N]) {
  Partials<N> folded;
#pragma unroll
  for (int i = 0; i < N; ++i) folded.set(i, fold(open[i], kv[i], score[i]));
  return folded;
}

// `state` points at the first of the N channels.
template <int N>
__device__ __forceinline__ Partials<N> load_state(const float* state) {
  Partials<N> open;
  load_values(state, open.max);
  load_values(state + kHeadDim, open.denominator);
  load_values(state + 2 * kHeadDim, open.sum);
  return open;
}

template <int N>
__device__ __forceinline__ void store_state(float* state, const Partials<N>& open) {
  store_values(state, open.max);
  store_values(state + kHeadDim, open.denominator);
  store_values(state + 2 * kHeadDim, open.sum);
}

// How a row is spread where many tokens come: two channels a thread, so that registers hold this many tokens twice.
using RunningThreads = RowThreads<kHeadDim, 2>;
constexpr int kRowsInFlight = 16;

// N channels of consecutive tokens of a window; those behind the last repeat it.
template <class T, int kRowsAtOnce, int N>
struct TokenRows {
  float kv[kRowsAtOnce][N];
  float gate[kRowsAtOnce][N];
  float position_bias[kRowsAtOnce][N];

  __device__ __forceinline__ void load(const Projections& in, const WindowTokens& tokens, int first, int channel) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int token = min(first + i, tokens.count - 1);
      const int64_t projection = static_cast<int64_t>(tokens.index + token) * kHeadDim + channel;
      load_values(static_cast<const T*>(in.kv) + projection, kv[i]);
      load_values(static_cast<const T*>(in.gate) + projection, gate[i]);
      load_values(in.position_bias + (tokens.position % kHcaRatio + token) * kHeadDim + channel, position_bias[i]);
    }
  }
};

// The tokens of this step in a window, after what `state` holds of earlier ones. The next rows are on their way while
// these are folded.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ Partials<N> fold_tokens(const Projections& in, const float* state,
                                                   const WindowTokens& tokens, int channel) {
  Partials<N> open = tokens.resumes ? load_state<N>(state) : empty_partials<N>();
  TokenRows<T, kRowsAtOnce, N> rows, next;
  rows.load(in, tokens, 0, channel);
#pragma unroll 1
  for (int first = 0; first < tokens.count; first += kRowsAtOnce) {
    if (first + kRowsAtOnce < tokens.count) next.load(in, tokens, first + kRowsAtOnce, channel);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      float score[N];
#pragma unroll
      for (int c = 0; c < N; ++c) score[c] = rows.gate[i][c] + rows.position_bias[i][c];
      if (first + i < tokens.count) open = fold(open, rows.kv[i], score);
    }
    rows = next;
  }
  return open;
}

// The HCA entry that token `index` closes, entry `row` of the step.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ void running_entry(const Compressor& compressor, int64_t layer, const Token& closing,
                                              int index, int row, const RowThreads<kHeadDim, N>& threads,
                                              float (&x)[N]) {
  const int channel = threads.channel();
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  const auto finish = FinishOf<N>::template load<kHeadDim>(compressor.norm_weight, compressor.cos + angles,
                                                           compressor.sin + angles, channel);
  const WindowTokens tokens = window_tokens(closing.start, closing.position, index);
  const float* state = running_state(compressor.tail, layer, closing.slot) + channel;
  pooled(fold_tokens<T, kRowsAtOnce, N>(compressor.projections, state, tokens, channel), x);
  finish.template apply<kHeadDim>(x, threads.sum(square_sum(x)), compressor.eps, channel);
}

// The tokens of a request's step whose window stays open; `end` is the step's token behind its last.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ void append_running(const Tail& tail, const Projections& in, int64_t layer,
                                               const Request& request, int end,
                                               const RowThreads<kHeadDim, N>& threads) {
  if (request.next % kHcaRatio == 0) return;
  const int channel = threads.channel();
  float* state = running_state(tail, layer, request.slot) + channel;
  const WindowTokens tokens = window_tokens(request.start, request.next - 1, end - 1);
  store_state(state, fold_tokens<T, kRowsAtOnce, N>(in, state, tokens, channel));
}

}  // namespace dsv4::cuda
