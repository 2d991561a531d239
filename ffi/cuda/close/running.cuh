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

// Tokens of this step in a window, folded into what is open of it. The next rows are on their way while these are
// folded.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ Partials<N> fold_tokens(const Projections& in, Partials<N> open, const WindowTokens& tokens,
                                                   int channel) {
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

// The same, after what `state` holds of earlier tokens, if it holds any.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ Partials<N> fold_tokens(const Projections& in, const float* state,
                                                   const WindowTokens& tokens, int channel) {
  const Partials<N> open = tokens.resumes ? load_state<N>(state) : empty_partials<N>();
  return fold_tokens<T, kRowsAtOnce, N>(in, open, tokens, channel);
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
  const float* state = state_before(compressor.tail, layer, closing.slot, closing.start) + channel;
  pooled(fold_tokens<T, kRowsAtOnce, N>(compressor.projections, state, tokens, channel), x);
  finish.template apply<kHeadDim>(x, threads.sum(square_sum(x)), compressor.eps, channel);
}

// The states after the last tokens of a request's step, as far as those leave a window open; `end` is the step's token
// behind its last. Up to the first of a window's states tokens are folded in one go, then one by one.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ void append_running(const Tail& tail, const Projections& in, int64_t layer,
                                               const Request& request, int end,
                                               const RowThreads<kHeadDim, N>& threads) {
  const int channel = threads.channel(), first = end - request.next;  // plus a position: the token's place in the step
  const int kept = first_state(tail, request.start, request.next);
#pragma unroll 1
  for (int window = kept / kHcaRatio * kHcaRatio; window < request.next; window += kHcaRatio) {
    const WindowStates states = window_states(window, kept, request.next);
    if (states.first > states.last) continue;
    const WindowTokens tokens = window_tokens(request.start, states.first, first + states.first);
    const float* before = state_before(tail, layer, request.slot, request.start) + channel;
    Partials<N> open = fold_tokens<T, kRowsAtOnce, N>(in, before, tokens, channel);
    store_state(running_state(tail, layer, request.slot, states.first) + channel, open);
#pragma unroll 1
    for (int position = states.first + 1; position <= states.last; ++position) {
      const WindowTokens one{true, first + position, position, 1};
      open = fold_tokens<T, 1, N>(in, open, one, channel);
      store_state(running_state(tail, layer, request.slot, position) + channel, open);
    }
  }
}

}  // namespace dsv4::cuda
