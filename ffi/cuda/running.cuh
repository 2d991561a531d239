// The running tail on the GPU: four channels of a window's state, and tokens folded into it one after the other.
#pragma once

#include "window.cuh"

namespace dsv4::cuda {

__device__ __forceinline__ Partials<4> empty_partials() {
  Partials<4> empty;
#pragma unroll
  for (int i = 0; i < 4; ++i) empty.set(i, {kEmptyPartial.max, kEmptyPartial.denominator, kEmptyPartial.sum});
  return empty;
}

__device__ __forceinline__ Partials<4> fold(const Partials<4>& open, const float (&kv)[4], const float (&score)[4]) {
  Partials<4> folded;
#pragma unroll
  for (int i = 0; i < 4; ++i) folded.set(i, fold(open[i], kv[i], score[i]));
  return folded;
}

// `state` points at the first of the four channels.
__device__ __forceinline__ Partials<4> load_state(const float* state) {
  Partials<4> open;
  load_values(state, open.max);
  load_values(state + kHeadDim, open.denominator);
  load_values(state + 2 * kHeadDim, open.sum);
  return open;
}

__device__ __forceinline__ void store_state(float* state, const Partials<4>& open) {
  store_values(state, open.max);
  store_values(state + kHeadDim, open.denominator);
  store_values(state + 2 * kHeadDim, open.sum);
}

constexpr int kRowsInFlight = 8;  // of many tokens; in decode, where one comes at a time, 1

// Four channels of consecutive tokens of a window; those behind the last repeat it.
template <class T, int kRowsAtOnce>
struct TokenRows {
  float kv[kRowsAtOnce][4];
  float gate[kRowsAtOnce][4];
  float ape[kRowsAtOnce][4];

  __device__ __forceinline__ void load(const Projections& in, const WindowTokens& tokens, int first, int channel) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int token = min(first + i, tokens.count - 1);
      const int64_t projection = static_cast<int64_t>(tokens.index + token) * kHeadDim + channel;
      load_values(static_cast<const T*>(in.kv) + projection, kv[i]);
      load_values(static_cast<const T*>(in.gate) + projection, gate[i]);
      load_values(in.ape + (tokens.position % kHcaRatio + token) * kHeadDim + channel, ape[i]);
    }
  }
};

// The tokens of this step in a window, after what `state` holds of earlier ones. The next rows are on their way while
// these are folded.
template <class T, int kRowsAtOnce>
__device__ __forceinline__ Partials<4> fold_tokens(const Projections& in, const float* state,
                                                   const WindowTokens& tokens, int channel) {
  Partials<4> open = tokens.resumes ? load_state(state) : empty_partials();
  TokenRows<T, kRowsAtOnce> rows, next;
  rows.load(in, tokens, 0, channel);
#pragma unroll 1
  for (int first = 0; first < tokens.count; first += kRowsAtOnce) {
    if (first + kRowsAtOnce < tokens.count) next.load(in, tokens, first + kRowsAtOnce, channel);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      float score[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c] = rows.gate[i][c] + rows.ape[i][c];
      if (first + i < tokens.count) open = fold(open, rows.kv[i], score);
    }
    rows = next;
  }
  return open;
}

// The HCA entry that token `index` closes, entry `row` of the step.
template <class T, int kRowsAtOnce>
__device__ __forceinline__ void running_entry(const Compressor& compressor, int64_t layer, const Token& closing,
                                              int index, int row, const RowThreads<kHeadDim>& threads, float (&x)[4]) {
  const int channel = threads.channel();
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  const Finish finish =
      Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
  const WindowTokens tokens = window_tokens(closing.start, closing.position, index);
  const float* state = running_state(compressor.tail, layer, closing.slot) + channel;
  pooled(fold_tokens<T, kRowsAtOnce>(compressor.projections, state, tokens, channel), x);
  finish.apply<kHeadDim>(x, threads.sum(square_sum(x)), compressor.eps, channel);
}

// The tokens of a request's step whose window stays open; `end` is the step's token behind its last.
template <class T, int kRowsAtOnce>
__device__ __forceinline__ void append_running(const Tail& tail, const Projections& in, int64_t layer,
                                               const Request& request, int end, int channel) {
  if (request.next % kHcaRatio == 0) return;
  float* state = running_state(tail, layer, request.slot) + channel;
  store_state(state,
              fold_tokens<T, kRowsAtOnce>(in, state, window_tokens(request.start, request.next - 1, end - 1), channel));
}

}  // namespace dsv4::cuda
