// All writes of one layer and step.
//
// A step with as many requests as tokens (decode) is one launch: a thread block, or for HCA a cluster, owns a request. It
// closes the request's windows before it moves the tail on, so nothing is read after it was overwritten, and a tail row
// that is no longer needed is simply never read again. A step with more tokens than requests (prefill) is two launches:
// one closes windows, the next stores the rows that survive.

#include "../common/entries.h"
#include "../common/kernels.h"
#include "cluster.cuh"
#include "launch.cuh"
#include "window.cuh"

namespace dsv4::cuda {
namespace {

// Calls `visit(Codec{})` for the codec at that place of the list; every thread takes the same branch.
template <class... Codecs, class Visitor>
__device__ __forceinline__ void visit_on_device(CodecList<Codecs...>, int index, Visitor&& visit) {
  int place = 0;
  static_cast<void>(((place++ == index ? (visit(Codecs{}), true) : false) || ...));
}

template <int W>
using CodecsOf = std::conditional_t<W == kHeadDim, HeadCodecs, KeyCodecs>;

// Pages that need not be a multiple of 16 bytes are aligned to 4.
template <class Codec>
constexpr int kAlignmentOf = (Layout<Codec>::kDataBytes + Layout<Codec>::kScaleBytes) % 16 == 0 || Codec::kPageMultiple % 16 == 0
                                 ? 16
                                 : 4;

__device__ __forceinline__ bool has_layer(const Pool& pool, int64_t layer) { return layer >= 0 && layer < pool.layers; }

// The tokens of request `index` of a decode step: first .. end - 1 of the flat step, from position `start`.
struct StepRequest {
  bool valid;
  int slot;
  int first;
  int end;
  int start;

  __device__ __forceinline__ Token token(int index) const { return {valid, slot, start + index - first, start, start + end - first}; }
};

__device__ __forceinline__ StepRequest step_request(const Plan& plan, int index, int slots) {
  // Three independent loads; the fourth and fifth only where a request brings more than one token.
  const int longest = *plan.longest(), slot = plan.request_slot()[index], position = plan.token_position()[index];
  if (slot < 0 || slot >= slots) return {false, slot, 0, 0, 0};
  if (longest == 1) return {position >= 0, slot, index, index + 1, position};
  const Request request = request_at(plan, index, slots);
  return {request.valid, slot, plan.query_start()[index], plan.query_start()[index + 1], request.start};
}

// Stores a finished window's entry.
template <int W>
__device__ __forceinline__ void store_entry(const Compression& part, int64_t layer, int block, const Token& closing, int row,
                                            const Partial4& partial, const RowThreads<W>& threads) {
  const Compressor& compressor = part.compressor;
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  float x[4];
  finish(x, partial, threads, compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, compressor.eps,
         compressor.hadamard);
  const EntryPlace place = place_in_block(part.pool, layer, block, closing.position / compressor.tail.geometry.ratio);
  if (place.page == nullptr) return;
  visit_on_device(CodecsOf<W>{}, part.pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    store_spread_row<Codec, kAlignmentOf<Codec>>(stored_row<Codec>(place.page, part.pool.rows, place.row), x, threads,
                                                 part.pool.global_scale);
  });
}

// Closes the CSA window of token `index`, entry `row` of the step.
template <int W, class T>
__device__ __forceinline__ void close_window(const Compression& part, const BlockTable& table, int64_t layer,
                                             const Token& closing, int index, int row, const RowThreads<W>& threads) {
  const Compressor& compressor = part.compressor;
  const int block = block_of_entry(part.pool, table, closing.slot, closing.position / kCsaRatio);
  const Partial4 partial =
      pool_rows<T>(compressor.tail, compressor.projections, layer, closing, index, 0, threads.channel());
  store_entry<W>(part, layer, block, closing, row, partial, threads);
}

// One compressor's work on a request of a decode step. A thread reads and writes only its own channels of the tail.
template <int W, class T>
__device__ __forceinline__ void compress_request(const Compression& part, const BlockTable& table, int64_t layer,
                                                 const StepRequest& request, const RowThreads<W>& threads) {
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kCsaRatio != kCsaRatio - 1) continue;
    close_window<W, T>(part, table, layer, token, index, index, threads);
    threads.sync();  // before the next window reuses the scratch
  }
  for (int index = request.first; index < request.end; ++index) {
    append_token<T>(part.compressor.tail, part.compressor.projections, layer, request.token(index), index, threads.channel());
  }
}

// One warp stores the window row of a token, normalizing and rotating it first where it comes raw.
template <class T>
__device__ __forceinline__ void store_window_row(const UpdateParams& params, int64_t layer, const Token& token, int index,
                                                 int lane) {
  const Pool& window = params.window.window;
  WarpRow<kHeadDim> row;
  const T* rows = static_cast<const T*>(params.window.rows) + static_cast<int64_t>(index) * kHeadDim;
#pragma unroll
  for (int q = 0; q < row.kQuads; ++q) load_four(rows + channel_of(q, lane), row.x[q]);
  if (params.norm.weight != nullptr) {
    float sums[row.kQuads];
#pragma unroll
    for (int q = 0; q < row.kQuads; ++q) sums[q] = sum_over_lanes(square_sum(row.x[q]));
    const float inverse = inverse_rms((sums[0] + sums[1]) + (sums[2] + sums[3]), kHeadDim, params.norm.eps);
    const int64_t angles = static_cast<int64_t>(index) * (kRopeDim / 2);
#pragma unroll
    for (int q = 0; q < row.kQuads; ++q) {
      float weight[4];
      load_four(params.norm.weight + channel_of(q, lane), weight);
#pragma unroll
      for (int i = 0; i < 4; ++i) row.x[q][i] = row.x[q][i] * inverse * weight[i];
      const int pair = (channel_of(q, lane) - (kHeadDim - kRopeDim)) / 2;
      if (channel_of(q, lane) >= kHeadDim - kRopeDim) {
        rotate_pairs(row.x[q], params.norm.cos + angles, params.norm.sin + angles, pair);
      }
    }
  }
  const int64_t page = layer * window.pages + token.slot;
  const int ring_row = token.position % window.rows;
  visit_on_device(HeadCodecs{}, window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (!std::is_base_of_v<Nvfp4Static<kHeadDim>, Codec>) {  // not a window format
      store_row<Codec, kAlignmentOf<Codec>>(
          stored_row<Codec>(window.data + page * window.page_bytes, window.rows, ring_row), row, lane, window.global_scale);
    }
  });
  if (lane == 0) params.window.positions[page * window.rows + ring_row] = token.position;
}

template <class RowT>
__device__ __forceinline__ void append_window_rows(const UpdateParams& params, const StepRequest& request, int lane) {
  const int64_t layer = *params.window.layer;
  if (!has_layer(params.window.window, layer)) return;
  const int first = max(request.first, request.end - params.window.window.rows);
  for (int index = first; index < request.end; ++index) {
    store_window_row<RowT>(params, layer, request.token(index), index, lane);
  }
}

constexpr int kCsaThreads = kRowThreads + 2 * kWarp;

// Decode, CSA: four warps on the entry, one on the indexer key, one on the window row.
template <class RowT, class T>
__global__ void __launch_bounds__(kCsaThreads) update_csa_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const StepRequest request = step_request(params.window.plan, blockIdx.x, params.table.slots);
  const int64_t layer = *params.kind_layer;
  if (!request.valid) return;
  const int thread = threadIdx.x;
  if (thread >= kRowThreads + kWarp) {
    append_window_rows<RowT>(params, request, thread % kWarp);
  } else if (!has_layer(params.entries.pool, layer)) {
    return;
  } else if (thread < kRowThreads) {
    compress_request<kHeadDim, T>(params.entries, params.table, layer, request, {thread, 1, scratch});
  } else {
    compress_request<kKeyDim, T>(params.keys, params.table, layer, request, {thread % kWarp, 0, nullptr});
  }
}

// Decode, HCA: a cluster a request; its first block also moves the tail on, its second stores the window row.
template <class RowT, class T>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kClusterThreads) update_hca_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int rank = blockIdx.x % kClusterBlocks;
  const StepRequest request = step_request(params.window.plan, blockIdx.x / kClusterBlocks, params.table.slots);
  const int64_t layer = *params.kind_layer;
  if (!request.valid) return;
  const Compression& part = params.entries;
  const RowThreads<kHeadDim> threads{static_cast<int>(threadIdx.x) % kRowThreads, 1, scratch};
  const bool first = rank == 0 && threadIdx.x < kRowThreads;
  if (has_layer(part.pool, layer)) {
    for (int index = request.first; index < request.end; ++index) {
      const Token token = request.token(index);
      if (token.position % kHcaRatio != kHcaRatio - 1) continue;
      const int block = first ? block_of_entry(part.pool, params.table, token.slot, token.position / kHcaRatio) : -1;
      const Partial4 partial = pool_with_cluster<T>(part.compressor, layer, token, index);
      if (first) store_entry<kHeadDim>(part, layer, block, token, index, partial, threads);
    }
    for (int index = request.first; first && index < request.end; ++index) {
      append_token<T>(part.compressor.tail, part.compressor.projections, layer, request.token(index), index, threads.channel());
    }
  }
  if (rank == 1 && threadIdx.x < kWarp) append_window_rows<RowT>(params, request, threadIdx.x);
}

// Any step, SWA: one warp a token.
template <class RowT>
__global__ void update_swa_kernel(UpdateParams params) {
  const int index = blockIdx.x * kRowWarps + threadIdx.x / kWarp;
  const Pool& window = params.window.window;
  const int64_t layer = *params.window.layer;
  const Token token = token_at(params.window.plan, index, static_cast<int>(window.pages));
  if (!token.valid || token.position < token.next - window.rows || !has_layer(window, layer)) return;
  store_window_row<RowT>(params, layer, token, index, threadIdx.x % kWarp);
}

// Prefill, CSA: one block a closing window, four warps on the entry, one on the indexer key.
template <class T>
__global__ void __launch_bounds__(kRowThreads + kWarp) close_csa_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int row = blockIdx.x, thread = threadIdx.x;
  const Plan& plan = params.window.plan;
  const int64_t layer = *params.kind_layer;
  const int index = plan.closing(kCsaRatio)[row];
  const Token closing = token_at(plan, index, params.table.slots);
  if (!closing.valid || !has_layer(params.entries.pool, layer)) return;
  if (thread < kRowThreads) {
    close_window<kHeadDim, T>(params.entries, params.table, layer, closing, index, row, {thread, 1, scratch});
  } else {
    close_window<kKeyDim, T>(params.keys, params.table, layer, closing, index, row, {thread % kWarp, 0, nullptr});
  }
}

// Prefill, HCA: one cluster a closing window.
template <class T>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kClusterThreads) close_hca_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int row = blockIdx.x / kClusterBlocks;
  const Plan& plan = params.window.plan;
  const Compression& part = params.entries;
  const int64_t layer = *params.kind_layer;
  const int index = plan.closing(kHcaRatio)[row];
  const Token closing = token_at(plan, index, params.table.slots);
  if (!closing.valid || !has_layer(part.pool, layer)) return;
  const RowThreads<kHeadDim> threads{static_cast<int>(threadIdx.x) % kRowThreads, 1, scratch};
  const bool first = blockIdx.x % kClusterBlocks == 0 && threadIdx.x < kRowThreads;
  const int block = first ? block_of_entry(part.pool, params.table, closing.slot, closing.position / kHcaRatio) : -1;
  const Partial4 partial = pool_with_cluster<T>(part.compressor, layer, closing, index);
  if (first) store_entry<kHeadDim>(part, layer, block, closing, row, partial, threads);
}

constexpr int kAppendTokens = 8;  // tokens of a block, a warp each for their window rows

// Prefill: the last tokens of each request, newest first; blockIdx.y walks back by eight.
template <class RowT, class T>
__global__ void __launch_bounds__(kAppendTokens * kWarp) append_last_tokens_kernel(UpdateParams params) {
  const Plan& plan = params.window.plan;
  const Request request = request_at(plan, blockIdx.x, params.table.slots);
  if (!request.valid) return;
  const int end = plan.query_start()[blockIdx.x + 1], count = request.next - request.start;
  const auto token_back = [&](int back) {
    return Token{back < count, request.slot, request.next - 1 - back, request.start, request.next};
  };
  const int back = blockIdx.y * kAppendTokens + threadIdx.x / kWarp;
  const int64_t window_layer = *params.window.layer, layer = *params.kind_layer;
  if (back < params.window.window.rows && back < count && has_layer(params.window.window, window_layer)) {
    store_window_row<RowT>(params, window_layer, token_back(back), end - 1 - back, threadIdx.x % kWarp);
  }
  if (!has_layer(params.entries.pool, layer)) return;
  const bool has_keys = params.keys.compressor.tail.data != nullptr;
  for (int i = 0; i < kAppendTokens; ++i) {
    const Token token = token_back(blockIdx.y * kAppendTokens + i);
    const int index = end - 1 - (blockIdx.y * kAppendTokens + i);
    if (!token.valid) return;
    const auto append = [&](const Compression& part, int channel) {
      append_token<T>(part.compressor.tail, part.compressor.projections, layer, token, index, channel);
    };
    if (threadIdx.x < kRowThreads) {
      append(params.entries, 4 * threadIdx.x);
    } else if (has_keys && threadIdx.x < kRowThreads + kWarp) {
      append(params.keys, 4 * (threadIdx.x - kRowThreads));
    }
  }
}

template <class RowT, class T>
void launch_update(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const unsigned tokens = static_cast<unsigned>(plan.tokens), requests = static_cast<unsigned>(plan.requests);
  const TailGeometry& geometry = params.entries.compressor.tail.geometry;
  const bool csa = geometry.overlaps();
  if (tokens == requests) {
    if (csa) {
      update_csa_kernel<RowT, T><<<requests, kCsaThreads, 0, stream>>>(params);
    } else {
      update_hca_kernel<RowT, T><<<requests * kClusterBlocks, kClusterThreads, 0, stream>>>(params);
    }
    return;
  }
  const unsigned closing = static_cast<unsigned>(closing_capacity(plan.tokens, plan.requests, geometry.ratio));
  if (closing > 0 && csa) close_csa_kernel<T><<<closing, kRowThreads + kWarp, 0, stream>>>(params);
  if (closing > 0 && !csa) close_hca_kernel<T><<<closing * kClusterBlocks, kClusterThreads, 0, stream>>>(params);
  const int rows = std::min(plan.tokens, std::max(params.window.window.rows, geometry.rows()));
  append_last_tokens_kernel<RowT, T>
      <<<dim3(requests, blocks_for(rows, kAppendTokens)), kAppendTokens * kWarp, 0, stream>>>(params);
}

}  // namespace

const char* update(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  if (plan.tokens == 0 || plan.requests == 0) return nullptr;
  with_element(params.window.element, [&](auto row_element) {
    using RowT = decltype(row_element);
    if (params.entries.compressor.tail.data == nullptr) {
      update_swa_kernel<RowT><<<blocks_for(plan.tokens, kRowWarps), kRowWarps * kWarp, 0, stream>>>(params);
      return;
    }
    with_element(params.entries.compressor.projections.element,
                 [&](auto element) { launch_update<RowT, decltype(element)>(stream, params); });
  });
  return launch_error();
}

}  // namespace dsv4::cuda
