// What one request writes in a decode step to which it may bring several tokens (drafts), or none: row after row, by
// the threads that decode.cuh has for one. Windows close before the tail moves on, and a thread reads and writes only
// its own channels of it.
#pragma once

#include "cuda/state/tail.cuh"
#include "cuda/update/decode.cuh"
#include "cuda/update/update.cuh"

namespace dsv4::cuda {

// The tokens of request `index` of a decode step: first .. end - 1 of the flat step, from position `start`.
struct StepRequest {
  bool valid;
  int slot;
  int first;
  int end;
  int start;

  __device__ __forceinline__ Token token(int index) const {
    return {valid, slot, start + index - first, start, start + end - first};
  }
};

__device__ __forceinline__ StepRequest step_request(const Plan& plan, int index, int slots) {
  const Request request = request_at(plan, index, slots);
  return {request.valid, request.slot, plan.query_start()[index], plan.query_start()[index + 1], request.start};
}

// Calls `close(token, index)` for each token that closes a window, of request `place` of a decode step. The request is
// looked up anew each time: closing a window leaves no registers to keep it in.
template <int kRatio, class Close>
__device__ __forceinline__ void for_each_closing(const UpdateParams& params, int place, Close&& close) {
#pragma unroll 1
  for (int window = 0;; ++window) {
    const StepRequest request = step_request(params.window.plan, place, params.table.slots);
    const int index = request.first + kRatio - 1 - request.start % kRatio + window * kRatio;
    if (!request.valid || index >= request.end) return;
    close(request.token(index), index);
  }
}

// The window rows that survive, the next one on its way while one is stored.
template <class RowT, int N>
__device__ __forceinline__ void append_window_rows(const UpdateParams& params, int place,
                                                   const RowThreads<kHeadDim, N>& threads) {
  const Pool& window = params.window.window;
  const Norm& norm = params.norm;
  const bool raw = norm.weight != nullptr;
  const int64_t layer = *params.window.layer;
  const StepRequest request = step_request(params.window.plan, place, static_cast<int>(window.pages));
  if (!request.valid || !has_layer(window, layer)) return;
  float x[N], next[N];
  FinishOf<N> finish{};
  if (raw) load_early(norm.weight + threads.channel(), finish.weight);
  const auto load = [&](int index, float (&row)[N]) {
    load_early(static_cast<const RowT*>(params.window.rows) + (int64_t{index} * kHeadDim + threads.channel()), row);
  };
  int index = max(request.first, request.end - window.rows);
  load(index, x);
  threads.sync();  // a row was summed up ahead of the branch that led here: its scratch may still be read
#pragma unroll 1
  for (; index < request.end; ++index) {
    if (raw) {
      const int64_t angles = int64_t{index} * (kRopeDim / 2);
      finish.template load_angles<kHeadDim>(norm.cos + angles, norm.sin + angles, threads.channel());
    }
    if (index + 1 < request.end) load(index + 1, next);
    if (raw) finish.template apply<kHeadDim>(x, threads.sum(square_sum(x)), norm.eps, threads.channel());
    store_window_token(params, layer, request.slot, request.token(index).position, x, threads);
    threads.sync();  // before the next row reuses the scratch
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = next[i];
  }
}

// One CSA compressor's part.
template <bool kDeep, class T, int W, int N>
__device__ __forceinline__ void compress_request(const UpdateParams& params, const Compression& part, int place,
                                                 const RowThreads<W, N>& threads) {
  const Compressor compressor = with_constants<W, kCsaRatio, kDeep>(part.compressor);
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const unsigned layer = *params.kind_layer;  // a negative one is beyond all
  if (!has_layer(pool, layer)) return;
  for_each_closing<kCsaRatio>(params, place, [&](const Token& token, int index) {
    close_csa_window<T>(compressor, pool, params.table, params.kind_layer, token, index, index, threads);
    threads.sync();  // before the next window reuses the scratch
  });
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid) return;
  move_tail_on<T, 1, 2, N>(compressor.tail, compressor.projections, layer, request.token(request.first), request.first,
                           0, threads.channel());
}

// One block's part of an HCA request.
template <bool kDeep, class T, class At>
__device__ __forceinline__ void compress_hca_request(const UpdateParams& params, int place, const At& at) {
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio, kDeep>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const unsigned layer = *params.kind_layer;  // a negative one is beyond all
  if (!has_layer(pool, layer)) return;
  for_each_closing<kHcaRatio>(params, place, [&](const Token& token, int index) {
    close_hca_window<T>(compressor, pool, params.table, layer, token, index, index, at);
  });
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid) return;
  // The barriers of the last entry stand between all reads of the tail and these writes.
  move_tail_on<T, At::kRanks * At::kSplits, 1, 4>(compressor.tail, compressor.projections, layer,
                                                  request.token(request.first), request.first,
                                                  at.rank * At::kSplits + at.split, at.channel());
}

// A running HCA tail's part.
template <class T>
__device__ __forceinline__ void fold_request(const UpdateParams& params, int place,
                                             const RowThreads<kHeadDim>& threads) {
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const unsigned layer = *params.kind_layer;  // a negative one is beyond all
  if (!has_layer(pool, layer)) return;
  for_each_closing<kHcaRatio>(params, place, [&](const Token& token, int index) {
    close_running_window<T, 1>(compressor, pool, params.table, layer, token, index, index, threads);
    threads.sync();  // before the next window reuses the scratch
  });
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid) return;
  const Request whole{true, request.slot, request.start, request.token(request.end).position};
  append_running<T, 1>(compressor.tail, compressor.projections, layer, whole, request.end, threads);
}

}  // namespace dsv4::cuda
