// All writes of one layer and step.
//
// A step with as many requests as tokens (decode) is one launch, in which the blocks that keep what a request brings to
// a tail also close its windows. They do so before they move that tail on, so nothing is read after it was overwritten,
// and a tail row that is no longer needed is simply never read again. A step with more tokens than requests is
// prefill.cu's.

#include "cuda/update/update.cuh"

#include "cuda/update/decode.cuh"
#include "ops/signatures.h"

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

// Calls `close(token, index)` for each of the request's tokens that closes a window.
template <int kRatio, class Close>
__device__ __forceinline__ void for_each_closing(const StepRequest& request, Close&& close) {
  for (int index = request.first; index < request.end; ++index) {
    const Token token = request.token(index);
    if (token.position % kRatio == kRatio - 1) close(token, index);
  }
}

// Calls `work(compressor, pool, layer, request)` for request `place` of a decode step, if there is one.
template <int W, int kRatio, class Work>
__device__ __forceinline__ void with_request(const UpdateParams& params, const Compression& part, int place,
                                             Work&& work) {
  const Pool pool = with_rows<kBlockTokens / kRatio>(part.pool);
  const int64_t layer = *params.kind_layer;
  const StepRequest request = step_request(params.window.plan, place, params.table.slots);
  if (request.valid && has_layer(pool, layer)) {
    work(with_constants<W, kRatio>(part.compressor), pool, layer, request);
  }
}

// One compressor's work on a request of a decode step that brings any number of tokens. A thread reads and writes only
// its own channels of the tail. Out of line, to leave the usual case short.
template <int W, class T>
__device__ __noinline__ void compress_request(const UpdateParams& params, const Compression& part, int place,
                                              RowThreads<W> threads) {
  with_request<W, kCsaRatio>(
      params, part, place, [&](const auto& compressor, const auto& pool, auto layer, auto request) {
        for_each_closing<kCsaRatio>(request, [&](const Token& token, int index) {
          close_csa_window<W, T>(compressor, pool, params.table, layer, token, index, index, threads);
          threads.sync();  // before the next window reuses the scratch
        });
        for (int index = request.first; index < request.end; ++index) {
          append_token<T>(compressor.tail, compressor.projections, layer, request.token(index), index,
                          threads.channel());
        }
      });
}

// A running HCA tail's work on a request of a decode step that brings any number of tokens.
template <class T>
__device__ __noinline__ void fold_request(const UpdateParams& params, int place, RowThreads<kHeadDim> threads) {
  with_request<kHeadDim, kHcaRatio>(
      params, params.entries, place, [&](const auto& compressor, const auto& pool, auto layer, auto request) {
        for_each_closing<kHcaRatio>(request, [&](const Token& token, int index) {
          close_running_window<T, 1>(compressor, pool, params.table, layer, token, index, index, threads);
          threads.sync();  // before the next window reuses the scratch
        });
        const Request whole{true, request.slot, request.start, request.token(request.end).position};
        append_running<T, 1>(compressor.tail, compressor.projections, layer, whole, request.end, threads);
      });
}

// The window rows of a request of a decode step that brings any number of tokens, by one warp.
template <class RowT>
__device__ __noinline__ void append_window_rows(const UpdateParams& params, int place, int lane) {
  const Pool& window = params.window.window;
  const int64_t layer = *params.window.layer;
  const StepRequest request = step_request(params.window.plan, place, static_cast<int>(window.pages));
  if (!request.valid || !has_layer(window, layer)) return;
  const WarpRow<kHeadDim> weight = load_norm_weight(params, lane);
  for (int index = max(request.first, request.end - window.rows); index < request.end; ++index) {
    store_window_row(params, layer, request.token(index), load_window_row<RowT>(params, index, lane), weight, lane);
  }
}

// Decode's two ways, by how many tokens its requests bring: the window row, and one CSA compressor's part.
template <class RowT, int N>
__device__ __forceinline__ void append_window(const UpdateParams& params, const TokenFields& fields, int place,
                                              const RowThreads<kHeadDim, N>& threads) {
  append_window_token<RowT>(params, fields, place, threads, [&] {
    if (threads.thread < kWarp) append_window_rows<RowT>(params, place, threads.thread);
  });
}

template <int W, class T>
__device__ __forceinline__ void compress_tokens(const UpdateParams& params, const Compression& part,
                                                const TokenFields& fields, int place, const RowThreads<W, 2>& threads) {
  compress_csa_token<W, T>(params, part, fields, place, threads, [&] {
    const RowThreads<W> quads{threads.thread, threads.barrier, threads.scratch};
    if (quads.thread < quads.kThreads) compress_request<W, T>(params, part, place, quads);
  });
}

using EntryThreads = RowThreads<kHeadDim, 2>;
using KeyThreads = RowThreads<kKeyDim, 2>;

// Decode, CSA: two blocks a request, one for the entry, one for the indexer key and the window row.
template <class RowT, class T>
__global__ void __launch_bounds__(EntryThreads::kThreads, 4)
    update_csa_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2][2 * EntryThreads::kWarps];
  const int thread = threadIdx.x, place = blockIdx.x;
  if (blockIdx.y == 0) {
    compress_tokens<kHeadDim, T>(params, params.entries, fields, place, EntryThreads{thread, 1, scratch[0]});
  } else if (thread < kRowThreads) {
    append_window<RowT>(params, fields, place, RowThreads<kHeadDim>{thread, 1, scratch[0]});
  } else if (thread < kRowThreads + KeyThreads::kThreads) {
    compress_tokens<kKeyDim, T>(params, params.keys, fields, place, KeyThreads{thread - kRowThreads, 2, scratch[1]});
  }
}

// One block's work on an HCA request of a decode step that brings any number of tokens.
template <class T, class At>
__device__ __noinline__ void compress_hca_request(const UpdateParams& params, int place) {
  with_request<kHeadDim, kHcaRatio>(
      params, params.entries, place, [&](const auto& compressor, const auto& pool, auto layer, auto request) {
        const At at;
        for_each_closing<kHcaRatio>(request, [&](const Token& token, int index) {
          close_hca_window<T>(compressor, pool, params.table, layer, token, index, index, at);
        });
        // The barriers of the last entry stand between all reads of the tail and these writes.
        for (int index = request.first; at.finishes() && index < request.end; ++index) {
          append_token<T>(compressor.tail, compressor.projections, layer, request.token(index), index, at.channel());
        }
      });
}

// Decode, HCA: a cluster of blocks a request, so that the 512 KiB of a closing window come by many multiprocessors. The
// last block's last threads store the window row first.
template <class RowT, class T, int kRanks>
__global__ void __cluster_dims__(kRanks, 1, 1) __launch_bounds__(kHcaThreads)
    update_hca_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2 * EntryThreads::kWarps];
  constexpr int kOthers = kHcaThreads - EntryThreads::kThreads;
  using At = HcaThread<kRanks, kHcaThreads>;
  const At at;
  const int thread = threadIdx.x, place = blockIdx.x / kRanks;
  const OnlyToken only(fields, place, params.kind_layer);
  if (at.rank == kRanks - 1 && thread >= kOthers) {
    append_window<RowT>(params, fields, place, EntryThreads{thread - kOthers, 1, scratch});
  }
  if (!only.is_only()) {
    compress_hca_request<T, At>(params, place);
    return;
  }
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  if (!only.fits(pool, params.table.slots)) return;
  if (only.position % kHcaRatio != kHcaRatio - 1) {
    if (at.finishes()) append_hca_token<T>(params, only, place, at.channel());
  } else {
    const int position = static_cast<int>(only.position);
    const Token token{true, static_cast<int>(only.slot), position, position, position + 1};
    close_hca_window<T>(compressor, pool, params.table, only.layer, token, place, place, at);
  }
}

// Decode, HCA with a running tail: one block a request, whose last threads store the window row.
template <class RowT, class T>
__global__ void __launch_bounds__(kRowThreads + EntryThreads::kThreads, 2)
    update_running_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2][2 * EntryThreads::kWarps];
  const int thread = threadIdx.x, place = blockIdx.x;
  if (thread >= kRowThreads) {
    append_window<RowT>(params, fields, place, EntryThreads{thread - kRowThreads, 2, scratch[1]});
  } else {
    const RowThreads<kHeadDim> threads{thread, 1, scratch[0]};
    fold_token<T>(params, fields, place, threads, [&] { fold_request<T>(params, place, threads); });
  }
}

// Decode, SWA: one block a request.
template <class RowT>
__global__ void __launch_bounds__(EntryThreads::kThreads)
    update_swa_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2 * EntryThreads::kWarps];
  append_window<RowT>(params, fields, blockIdx.x, EntryThreads{static_cast<int>(threadIdx.x), 1, scratch});
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
  } else if (tail.running) {
    update_running_kernel<RowT, T><<<requests, kRowThreads + EntryThreads::kThreads, 0, stream>>>(params, fields);
  } else {
    const auto launch = [&](auto ranks) {
      constexpr int kRanks = decltype(ranks)::value;
      update_hca_kernel<RowT, T, kRanks><<<requests * kRanks, kHcaThreads, 0, stream>>>(params, fields);
    };
    const unsigned ranks = multiprocessors() / requests;
    if (ranks >= 4) {
      launch(std::integral_constant<int, 4>{});
    } else if (ranks >= 2) {
      launch(std::integral_constant<int, 2>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
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
