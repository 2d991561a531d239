// All writes of one layer and step.
//
// A step with as many requests as tokens (decode) is one launch, in which the threads that own a request's channels of
// a tail also close its windows. They do so before they move that tail on, so nothing is read after it was overwritten,
// and a tail row that is no longer needed is simply never read again. A step with more tokens than requests (prefill)
// is two launches: one closes windows, the next stores the rows that survive.

#include "../common/entries.h"
#include "../common/kernels.h"
#include "decode.cuh"
#include "hca.cuh"
#include "launch.cuh"
#include "window.cuh"

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
  const Request request = request_at(plan, index, slots);
  return {request.valid, request.slot, plan.query_start()[index], plan.query_start()[index + 1], request.start};
}

// The amax of those of four channels that a pool's codec quantizes, where it needs that of the row.
template <int W>
__device__ __forceinline__ float amax_for(const Pool& pool, const float (&x)[4], int channel) {
  float amax = 0.0f;
  visit_on_device(CodecsOf<W>{}, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (Codec::kNeedsRowAmax) amax = quad_amax<Codec>(x, channel);
  });
  return amax;
}

// Stores four channels of an entry in its block; nothing if there is none.
template <int W>
__device__ __forceinline__ void store_entry(const Pool& pool, int64_t layer, int block, int entry, const float (&x)[4],
                                            int channel, float row_amax) {
  const EntryPlace place = place_in_block(pool, layer, block, entry);
  if (place.page == nullptr) return;
  visit_on_device(CodecsOf<W>{}, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    store_part<Codec, kAlignmentOf<Codec>>(stored_row<Codec>(place.page, pool.rows, place.row), x, channel, row_amax,
                                           pool.global_scale);
  });
}

// Closes the CSA window of token `index`, entry `row` of the step.
template <int W, class T>
__device__ __forceinline__ void close_csa_window(const Compressor& compressor, const Pool& pool,
                                                 const BlockTable& table, int64_t layer, const Token& closing,
                                                 int index, int row, const RowThreads<W>& threads) {
  const int entry = closing.position / kCsaRatio;
  const int block = block_of_entry(pool, table, closing.slot, entry);
  float x[4];
  csa_entry<W, T>(compressor, layer, closing, index, row, threads, x);
  const float row_amax = threads.max(amax_for<W>(pool, x, threads.channel()));
  store_entry<W>(pool, layer, block, entry, x, threads.channel(), row_amax);
}

// Closes the HCA window of token `index`, entry `row` of the step.
template <class T, int kBlocks>
__device__ __forceinline__ void close_hca_window(const Compressor& compressor, const Pool& pool,
                                                 const BlockTable& table, int64_t layer, const Token& closing,
                                                 int index, int row, const HcaThread<kBlocks>& at) {
  const int entry = closing.position / kHcaRatio;
  const int block = at.split == 0 ? block_of_entry(pool, table, closing.slot, entry) : -1;
  hca_entry<T>(
      compressor, layer, closing, index, row, at,
      [&](const float (&x)[4], int channel) { return amax_for<kHeadDim>(pool, x, channel); },
      [&](const float (&x)[4], int channel, float row_amax) {
        store_entry<kHeadDim>(pool, layer, block, entry, x, channel, row_amax);
      });
}

// One compressor's work on a request of a decode step that brings any number of tokens. A thread reads and writes only
// its own channels of the tail. Out of line, to leave the usual case short.
template <int W, class T>
__device__ __noinline__ void compress_request(const UpdateParams& params, const Compression& part, int place,
                                              RowThreads<W> threads) {
  const Compressor compressor = with_constants<W, kCsaRatio>(part.compressor);
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const int64_t layer = *params.kind_layer;
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid || !has_layer(pool, layer)) return;
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kCsaRatio != kCsaRatio - 1) continue;
    close_csa_window<W, T>(compressor, pool, params.table, layer, token, index, index, threads);
    threads.sync();  // before the next window reuses the scratch
  }
  for (int index = request.first; index < request.end; ++index) {
    append_token<T>(compressor.tail, compressor.projections, layer, request.token(index), index, threads.channel());
  }
}

template <class RowT>
__device__ __forceinline__ WarpRow<kHeadDim> load_window_row(const UpdateParams& params, int index, int lane) {
  WarpRow<kHeadDim> row;
  const RowT* rows = static_cast<const RowT*>(params.window.rows) + static_cast<int64_t>(index) * kHeadDim;
#pragma unroll
  for (int q = 0; q < row.kQuads; ++q) load_four(rows + channel_of(q, lane), row.x[q]);
  return row;
}

// One warp stores the window row of a token, normalizing and rotating it first where it comes raw.
__device__ __forceinline__ void store_window_row(const UpdateParams& params, int64_t layer, const Token& token,
                                                 int index, WarpRow<kHeadDim> row, int lane) {
  const Pool& window = params.window.window;
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
          stored_row<Codec>(window.data + page * window.page_bytes, window.rows, ring_row), row, lane,
          window.global_scale);
    }
  });
  if (lane == 0) params.window.positions[page * window.rows + ring_row] = token.position;
}

// The window rows of a request of a decode step that brings any number of tokens, by one warp.
template <class RowT>
__device__ __noinline__ void append_window_rows(const UpdateParams& params, int place, int lane) {
  const Pool& window = params.window.window;
  const int64_t layer = *params.window.layer;
  const StepRequest request = step_request(params.window.plan, place, static_cast<int>(window.pages));
  if (!request.valid || !has_layer(window, layer)) return;
  for (int index = max(request.first, request.end - window.rows); index < request.end; ++index) {
    store_window_row(params, layer, request.token(index), index, load_window_row<RowT>(params, index, lane), lane);
  }
}

template <class RowT, int N>
__device__ __forceinline__ void append_window(const UpdateParams& params, const TokenFields& fields, int place,
                                              const RowThreads<kHeadDim, N>& threads) {
  append_window_token<RowT>(params, fields, place, threads, [&] {
    if (threads.thread < kWarp) append_window_rows<RowT>(params, place, threads.thread);
  });
}

template <int W, class T>
__device__ __forceinline__ void compress(const UpdateParams& params, const Compression& part, const TokenFields& fields,
                                         int place, const RowThreads<W, 2>& threads) {
  compress_csa_token<W, T>(params, part, fields, place, threads, [&] {
    const RowThreads<W> quads{threads.thread, threads.barrier, threads.scratch};
    if (quads.thread < quads.kThreads) compress_request<W, T>(params, part, place, quads);
  });
}

constexpr int kRowThreads = kHeadDim / 4;
using EntryThreads = RowThreads<kHeadDim, 2>;
using KeyThreads = RowThreads<kKeyDim, 2>;

// Decode, CSA: two blocks a request, one for the entry, one for the indexer key and the window row.
template <class RowT, class T>
__global__ void __launch_bounds__(EntryThreads::kThreads, 4)
    update_csa_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2][2 * EntryThreads::kWarps];
  const int thread = threadIdx.x, place = blockIdx.x;
  if (blockIdx.y == 0) {
    compress<kHeadDim, T>(params, params.entries, fields, place, EntryThreads{thread, 1, scratch[0]});
  } else if (thread < kRowThreads) {
    append_window<RowT>(params, fields, place, RowThreads<kHeadDim>{thread, 1, scratch[0]});
  } else if (thread < kRowThreads + KeyThreads::kThreads) {
    compress<kKeyDim, T>(params, params.keys, fields, place, KeyThreads{thread - kRowThreads, 2, scratch[1]});
  }
}

// Decode, HCA: one block a request. Its last threads store the window row, before they help where a window closes.
template <class RowT, class T>
__global__ void __launch_bounds__(kHcaThreads)
    update_hca_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2 * EntryThreads::kWarps];
  constexpr int kOthers = kHcaThreads - EntryThreads::kThreads;
  const HcaThread<1> at;
  const int thread = threadIdx.x, place = blockIdx.x, channel = at.channel();
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const Tail& tail = compressor.tail;
  const Projections& in = compressor.projections;
  const OnlyToken only(fields, place, params.kind_layer);
  if (thread >= kOthers) append_window<RowT>(params, fields, place, EntryThreads{thread - kOthers, 1, scratch});
  if (leaves_open<kHcaRatio>(only)) {
    if (at.split == 0 && only.fits(pool, params.table.slots)) append_hca_token<T>(params, only, place, channel);
    return;
  }
  const int64_t layer = *params.kind_layer;
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (!request.valid || !has_layer(pool, layer)) return;
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kHcaRatio != kHcaRatio - 1) continue;
    close_hca_window<T>(compressor, pool, params.table, layer, token, index, index, at);
  }
  // The barriers of the last window stand between all reads of the tail and these writes.
  for (int index = request.first; at.split == 0 && index < request.end; ++index) {
    append_token<T>(tail, in, layer, request.token(index), index, channel);
  }
}

// Decode, SWA: one block a request.
template <class RowT>
__global__ void __launch_bounds__(EntryThreads::kThreads)
    update_swa_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2 * EntryThreads::kWarps];
  append_window<RowT>(params, fields, blockIdx.x, EntryThreads{static_cast<int>(threadIdx.x), 1, scratch});
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
  constexpr int kRows = kBlockTokens / kCsaRatio;
  if (thread < kRowThreads) {
    close_csa_window<kHeadDim, T>(with_constants<kHeadDim, kCsaRatio>(params.entries.compressor),
                                  with_rows<kRows>(params.entries.pool), params.table, layer, closing, index, row,
                                  {thread, 1, scratch});
  } else {
    close_csa_window<kKeyDim, T>(with_constants<kKeyDim, kCsaRatio>(params.keys.compressor),
                                 with_rows<kRows>(params.keys.pool), params.table, layer, closing, index, row,
                                 {thread % kWarp, 0, nullptr});
  }
}

constexpr int kPrefillBlocks = 2;

// Prefill, HCA: one cluster a closing window.
template <class T>
__global__ void __cluster_dims__(kPrefillBlocks, 1, 1) __launch_bounds__(kHcaThreads)
    close_hca_kernel(UpdateParams params) {
  const int row = blockIdx.x / kPrefillBlocks;
  const Plan& plan = params.window.plan;
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int64_t layer = *params.kind_layer;
  const int index = plan.closing(kHcaRatio)[row];
  const Token closing = token_at(plan, index, params.table.slots);
  if (!closing.valid || !has_layer(pool, layer)) return;
  close_hca_window<T>(with_constants<kHeadDim, kHcaRatio>(params.entries.compressor), pool, params.table, layer,
                      closing, index, row, HcaThread<kPrefillBlocks>{});
}

constexpr int kAppendTokens = 8;  // tokens of a block, a warp each for their window rows and indexer halves
constexpr int kAppendThreads = kAppendTokens * kWarp;

// Prefill: the last tokens of each request, newest first; blockIdx.y walks back by eight.
template <class RowT, class T>
__global__ void __launch_bounds__(kAppendThreads) append_last_tokens_kernel(UpdateParams params) {
  const Plan& plan = params.window.plan;
  const Request request = request_at(plan, blockIdx.x, static_cast<int>(params.window.window.pages));
  if (!request.valid) return;
  const int end = plan.query_start()[blockIdx.x + 1], count = request.next - request.start;
  const int first = blockIdx.y * kAppendTokens, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto token_back = [&](int back) {
    return Token{back < count, request.slot, request.next - 1 - back, request.start, request.next};
  };

  const int64_t window_layer = *params.window.layer;
  const Token mine = token_back(first + warp);
  if (mine.valid && first + warp < params.window.window.rows && has_layer(params.window.window, window_layer)) {
    const int index = end - 1 - (first + warp);
    store_window_row(params, window_layer, mine, index, load_window_row<RowT>(params, index, lane), lane);
  }

  if (params.entries.compressor.tail.data == nullptr) return;
  const int64_t layer = *params.kind_layer;
  if (!has_layer(params.entries.pool, layer)) return;
  const auto append = [&](const Compressor& compressor, int back, int channel) {
    const Token token = token_back(back);
    const TailGeometry& geometry = compressor.tail.geometry;
    if (!token.valid || !(geometry.overlap_survives(token.position, token.next) ||
                          geometry.current_survives(token.position, token.next))) {
      return;
    }
    append_token<T>(compressor.tail, compressor.projections, layer, token, end - 1 - back, channel);
  };
  if (params.keys.compressor.tail.data != nullptr) append(params.keys.compressor, first + warp, 4 * lane);
  constexpr int kAtOnce = kAppendThreads / kRowThreads;
  for (int i = threadIdx.x / kRowThreads; i < kAppendTokens; i += kAtOnce) {
    append(params.entries.compressor, first + i, 4 * (threadIdx.x % kRowThreads));
  }
}

template <class RowT, class T>
void launch_decode(CUstream_st* stream, const UpdateParams& params) {
  const unsigned requests = static_cast<unsigned>(params.window.plan.requests);
  const TokenFields fields(params.window.plan);
  const Tail& tail = params.entries.compressor.tail;
  if (tail.data == nullptr) {
    update_swa_kernel<RowT><<<requests, EntryThreads::kThreads, 0, stream>>>(params, fields);
  } else if (tail.geometry.overlaps()) {
    update_csa_kernel<RowT, T><<<dim3(requests, 2), EntryThreads::kThreads, 0, stream>>>(params, fields);
  } else {
    update_hca_kernel<RowT, T><<<requests, kHcaThreads, 0, stream>>>(params, fields);
  }
}

template <class RowT, class T>
void launch_prefill(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const Tail& tail = params.entries.compressor.tail;
  int rows = params.window.window.rows;
  if (tail.data != nullptr) {
    const TailGeometry& geometry = tail.geometry;
    const unsigned closing = static_cast<unsigned>(closing_capacity(plan.tokens, plan.requests, geometry.ratio));
    if (closing > 0 && geometry.overlaps()) close_csa_kernel<T><<<closing, kRowThreads + kWarp, 0, stream>>>(params);
    if (closing > 0 && !geometry.overlaps()) {
      close_hca_kernel<T><<<closing * kPrefillBlocks, kHcaThreads, 0, stream>>>(params);
    }
    rows = std::max(rows, geometry.rows());
  }
  append_last_tokens_kernel<RowT, T>
      <<<dim3(plan.requests, blocks_for(std::min(plan.tokens, rows), kAppendTokens)), kAppendThreads, 0, stream>>>(
          params);
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
