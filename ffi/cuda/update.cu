// All writes of one layer and step.
//
// A step with as many requests as tokens (decode) is one launch: a thread block owns a request. It closes the request's
// windows before it moves the tail on, so nothing is read after it was overwritten, and a tail row that is no longer
// needed is simply never read again. A step with more tokens than requests is prefill.cu's.

#include "update.cuh"

#include "../common/kernels.h"

namespace dsv4::cuda {
namespace {

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
  // Three independent loads; the fourth and fifth only where a request brings more than one token.
  const int longest = *plan.longest(), slot = plan.request_slot()[index], position = plan.token_position()[index];
  if (slot < 0 || slot >= slots) return {false, slot, 0, 0, 0};
  if (longest == 1) return {position >= 0, slot, index, index + 1, position};
  const Request request = request_at(plan, index, slots);
  return {request.valid, slot, plan.query_start()[index], plan.query_start()[index + 1], request.start};
}
// One compressor's work on a request of a decode step. A thread reads and writes only its own channels of the tail. The
// loads that need nothing of the plan, those of the request's only token, come first.
template <int W, class T>
__device__ __forceinline__ void compress_request(const UpdateParams& params, const Compression& part,
                                                 const RowThreads<W>& threads) {
  const Compressor compressor = with_constants<W, kCsaRatio>(part.compressor);
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const Tail& tail = compressor.tail;
  const Projections& in = compressor.projections;
  const TokenHalves own = load_halves<T>(tail, in, blockIdx.x, threads.channel());
  const int64_t layer = *params.kind_layer;
  const StepRequest request = step_request(params.window.plan, blockIdx.x, params.table.slots);
  if (!request.valid || !has_layer(part.pool, layer)) return;
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kCsaRatio != kCsaRatio - 1) continue;
    close_csa_window<W, T>(compressor, pool, params.table, layer, token, index, index, threads);
    threads.sync();  // before the next window reuses the scratch
  }
  for (int index = request.first; index < request.end; ++index) {
    const TokenHalves halves = index == blockIdx.x ? own : load_halves<T>(tail, in, index, threads.channel());
    store_halves(tail, in, layer, request.token(index), halves, threads.channel());
  }
}
// The window rows of request `place` of a decode step, by one warp.
template <class RowT>
__device__ __forceinline__ void append_window_rows(const UpdateParams& params, int place, int lane) {
  const WarpRow<kHeadDim> own = load_window_row<RowT>(params, place, lane);
  const int64_t layer = *params.window.layer;
  const StepRequest request = step_request(params.window.plan, place, static_cast<int>(params.window.window.pages));
  if (!request.valid || !has_layer(params.window.window, layer)) return;
  const int first = max(request.first, request.end - params.window.window.rows);
  for (int index = first; index < request.end; ++index) {
    const WarpRow<kHeadDim> row = index == place ? own : load_window_row<RowT>(params, index, lane);
    store_window_row(params, layer, request.token(index), index, row, lane);
  }
}
constexpr int kCsaThreads = kRowThreads + 2 * kWarp;

// Decode, CSA: four warps on the entry, one on the indexer key, one on the window row.
template <class RowT, class T>
__global__ void __launch_bounds__(kCsaThreads) update_csa_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int thread = threadIdx.x;
  if (thread >= kRowThreads + kWarp) {
    append_window_rows<RowT>(params, blockIdx.x, thread % kWarp);
  } else if (thread < kRowThreads) {
    compress_request<kHeadDim, T>(params, params.entries, {thread, 1, scratch});
  } else {
    compress_request<kKeyDim, T>(params, params.keys, {thread % kWarp, 0, nullptr});
  }
}

// Decode, HCA: one block a request. The first threads also move the tail on, a warp of the others stores the window
// row.
template <class RowT, class T>
__global__ void __launch_bounds__(kHcaThreads) update_hca_kernel(UpdateParams params) {
  const HcaThread at;
  const int place = blockIdx.x, channel = at.channel();
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const Tail& tail = compressor.tail;
  const Projections& in = compressor.projections;
  TokenHalves own;
  if (at.split == 0) own = load_halves<T>(tail, in, place, channel);
  if (at.split == 1 && at.thread < kWarp) append_window_rows<RowT>(params, place, at.thread);
  const int64_t layer = *params.kind_layer;
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid || !has_layer(pool, layer)) return;
  const auto append = [&](int index, const TokenHalves& halves) {
    store_halves(tail, in, layer, request.token(index), halves, channel);
  };
  const int next = request.start + request.end - request.first;
  if (request.start / kHcaRatio == next / kHcaRatio) {  // nothing closes, as in 127 of 128 steps
    for (int index = request.first; at.split == 0 && index < request.end; ++index) {
      append(index, index == place ? own : load_halves<T>(tail, in, index, channel));
    }
    return;
  }
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kHcaRatio != kHcaRatio - 1) continue;
    close_hca_window<T>(compressor, pool, params.table, layer, token, index, index, at);
  }
  // The barriers of the last window stand between all reads of the tail and these writes.
  for (int index = request.first; at.split == 0 && index < request.end; ++index) {
    append(index, load_halves<T>(tail, in, index, channel));
  }
}

// Decode, HCA with a running tail: four warps fold the request's tokens into its open window, one stores the window
// row.
template <class RowT, class T>
__global__ void __launch_bounds__(kRowThreads + kWarp) update_running_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int place = blockIdx.x, thread = threadIdx.x;
  if (thread >= kRowThreads) {
    append_window_rows<RowT>(params, place, thread % kWarp);
    return;
  }
  const RowThreads<kHeadDim> threads{thread, 1, scratch};
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int64_t layer = *params.kind_layer;
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid || !has_layer(pool, layer)) return;
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kHcaRatio != kHcaRatio - 1) continue;
    close_running_window<T, 1>(compressor, pool, params.table, layer, token, index, index, threads);
    threads.sync();  // before the next window reuses the scratch
  }
  const Request whole{true, request.slot, request.start, request.token(request.end).position};
  append_running<T, 1>(compressor.tail, compressor.projections, layer, whole, request.end, threads.channel());
}

// Decode, SWA: one warp a request.
template <class RowT>
__global__ void update_swa_kernel(UpdateParams params) {
  const int place = blockIdx.x * kRowWarps + threadIdx.x / kWarp;
  if (place < params.window.plan.requests) append_window_rows<RowT>(params, place, threadIdx.x % kWarp);
}

template <class RowT, class T>
void launch_decode(CUstream_st* stream, const UpdateParams& params) {
  const unsigned requests = static_cast<unsigned>(params.window.plan.requests);
  const Tail& tail = params.entries.compressor.tail;
  if (tail.data == nullptr) {
    update_swa_kernel<RowT><<<blocks_for(requests, kRowWarps), kRowWarps * kWarp, 0, stream>>>(params);
  } else if (tail.geometry.overlaps()) {
    update_csa_kernel<RowT, T><<<requests, kCsaThreads, 0, stream>>>(params);
  } else if (tail.running) {
    update_running_kernel<RowT, T><<<requests, kRowThreads + kWarp, 0, stream>>>(params);
  } else {
    update_hca_kernel<RowT, T><<<requests, kHcaThreads, 0, stream>>>(params);
  }
}

}  // namespace

const char* update(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  if (plan.tokens == 0 || plan.requests == 0) return nullptr;
  with_element(params.window.element, [&](auto row_element) {
    with_element(params.entries.compressor.projections.element, [&](auto element) {
      using RowT = decltype(row_element);
      using T = decltype(element);
      plan.tokens == plan.requests ? launch_decode<RowT, T>(stream, params) : launch_prefill<RowT, T>(stream, params);
    });
  });
  return launch_error();
}

}  // namespace dsv4::cuda
