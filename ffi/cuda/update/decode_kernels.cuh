// Decode: the writes of one layer in a step whose closing entry i belongs to token i, in one launch.
//
// The blocks that keep what a request brings to a tail also close its windows. They do so before they move that tail
// on, so nothing is read after it was overwritten, and a tail row that is no longer needed is simply never read again.
//
// Blocks and threads (rows have two channels a thread, or where 128 threads have one, four):
//   swa      one block a request.    256 threads: the window row.
//   csa      two blocks a request.   First: 256 threads, the entry. Second: 128 threads, the window row; 64, the key.
//   hca      1, 2 or 4 blocks a request, a cluster. 512 threads: the rows of a closing window in equal shares; before,
//            the last block's last 256 store the window row; behind, the first block's first 128 finish the entry, or
//            keep the token.
//   running  one block a request.    128 threads: the entry or the open window's state; 256, the window row.
// Barriers: kWindowRow, kEntryRow, kKeyRow, each among the threads of that row; hca has __syncthreads and the cluster's
// too (finish_hca_entry).
// Shared memory: for each row, two floats a warp; a key's Hadamard transform, 512 bytes; hca: what splits and blocks
// hand over, 18 KiB and 6 KiB a block of the cluster (finish_hca_entry). Registers that the launch bounds leave a
// thread: csa 64 (four blocks to a multiprocessor), running 80 (two), hca 128 (one), swa 255. No kernel spills, see
// scripts/architectures.sh.
#pragma once

#include "cuda/core/launch.cuh"
#include "cuda/update/requests.cuh"

namespace dsv4::cuda {
namespace {

using EntryThreads = RowThreads<kHeadDim, 2>;
using KeyThreads = RowThreads<kKeyDim, 2>;

// Decode's two ways, by how many tokens its requests bring: the window row, and one CSA compressor's part.
template <class RowT, int N>
__device__ __forceinline__ void append_window(const UpdateParams& params, const TokenFields& fields, int place,
                                              const RowThreads<kHeadDim, N>& threads) {
  append_window_token<RowT>(params, fields, place, threads,
                            [&] { append_window_rows<RowT>(params, place, threads.again()); });
}

template <bool kDeep, class T, int W>
__device__ __forceinline__ void compress_tokens(const UpdateParams& params, const Compression& part,
                                                const TokenFields& fields, int place, const RowThreads<W, 2>& threads) {
  compress_csa_token<kDeep, T>(params, part, fields, place, threads,
                               [&] { compress_request<kDeep, T>(params, part, place, threads.again()); });
}

// Blocks of csa to a multiprocessor. Deep rings and fp32 projections together need the registers of three.
template <class T, bool kDeep>
constexpr int kCsaBlocks = kDeep && sizeof(T) == 4 ? 3 : 4;

template <class RowT, class T, bool kDeep>
__global__ void __launch_bounds__(EntryThreads::kThreads, kCsaBlocks<T, kDeep>)
    update_csa_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2][2 * EntryThreads::kWarps];
  const int thread = threadIdx.x, place = blockIdx.x;
  if (blockIdx.y == 0) {
    const EntryThreads threads{thread, Barrier::kEntryRow, scratch[0]};
    compress_tokens<kDeep, T>(params, params.entries, fields, place, threads);
  } else if (thread < kRowThreads) {
    append_window<RowT>(params, fields, place, RowThreads<kHeadDim>{thread, Barrier::kWindowRow, scratch[0]});
  } else if (thread < kRowThreads + KeyThreads::kThreads) {
    const KeyThreads threads{thread - kRowThreads, Barrier::kKeyRow, scratch[1]};
    compress_tokens<kDeep, T>(params, params.keys, fields, place, threads);
  }
}

// A cluster of blocks a request, so that the 512 KiB of a closing window come by many multiprocessors.
template <class RowT, class T, int kRanks, bool kDeep>
__global__ void DSV4_CLUSTER_DIMS(kRanks) __launch_bounds__(kHcaThreads)
    update_hca_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2 * EntryThreads::kWarps];
  constexpr int kOthers = kHcaThreads - EntryThreads::kThreads;
  using At = HcaThread<kRanks, kHcaThreads>;
  if constexpr (!At::kCompiled) return;
  const At at;
  const int thread = threadIdx.x, place = blockIdx.x / kRanks;
  const OnlyToken only(fields, place, params.kind_layer);
  const bool has_window_row = at.rank == kRanks - 1 && thread >= kOthers;
  const EntryThreads window_threads{thread - kOthers, Barrier::kWindowRow, scratch};
  if (has_window_row) append_window_token<RowT>(params, fields, place, window_threads, [] {});
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  if (!only.fits(pool, params.table.slots)) {
    if (!only.has_others()) return;
    if (has_window_row) append_window_rows<RowT>(params, place, window_threads.again());
    compress_hca_request<kDeep, T>(params, place, at);
    return;
  }
  const bool closes = only.position % kHcaRatio == kHcaRatio - 1;
  if (!kDeep && !closes) {
    if (at.finishes()) append_hca_token<kDeep, T>(params, only, place, at.channel());
    return;
  }
  if (closes) {
    const int position = static_cast<int>(only.position);
    const Token token{true, static_cast<int>(only.slot), position, position, position + 1};
    close_hca_window<T>(with_constants<kHeadDim, kHcaRatio, kDeep>(params.entries.compressor), pool, params.table,
                        only.layer, token, place, place, at);
  }
  if (kDeep && at.finishes()) append_hca_token<kDeep, T>(params, only, place, at.channel());
}

template <class RowT, class T>
__global__ void __launch_bounds__(kRowThreads + EntryThreads::kThreads, 2)
    update_running_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2][2 * EntryThreads::kWarps];
  const int thread = threadIdx.x, place = blockIdx.x;
  if (thread >= kRowThreads) {
    const EntryThreads threads{thread - kRowThreads, Barrier::kWindowRow, scratch[1]};
    append_window<RowT>(params, fields, place, threads);
  } else {
    const RowThreads<kHeadDim> threads{thread, Barrier::kEntryRow, scratch[0]};
    fold_token<T>(params, fields, place, threads, [&] { fold_request<T>(params, place, threads); });
  }
}

template <class RowT>
__global__ void __launch_bounds__(EntryThreads::kThreads)
    update_swa_kernel(const __grid_constant__ UpdateParams params, TokenFields fields) {
  __shared__ alignas(16) float scratch[2 * EntryThreads::kWarps];
  const EntryThreads threads{static_cast<int>(threadIdx.x), Barrier::kWindowRow, scratch};
  append_window<RowT>(params, fields, blockIdx.x, threads);
}

template <class RowT, class T, bool kDeep>
void launch_hca_decode(CUstream_st* stream, const UpdateParams& params, const TokenFields& fields) {
  const unsigned requests = static_cast<unsigned>(params.window.plan.requests);
  const auto launch = [&](auto ranks) {
    constexpr int kRanks = decltype(ranks)::value;
    update_hca_kernel<RowT, T, kRanks, kDeep><<<requests * kRanks, kHcaThreads, 0, stream>>>(params, fields);
  };
  const unsigned ranks = has_clusters(update_hca_kernel<RowT, T, 4, kDeep>) ? multiprocessors() / requests : 1;
  if (ranks >= 4) {
    launch(std::integral_constant<int, 4>{});
  } else if (ranks >= 2) {
    launch(std::integral_constant<int, 2>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

}  // namespace

template <class RowT, class T>
cudaError_t launch_decode(CUstream_st* stream, const UpdateParams& params) {
  const unsigned requests = static_cast<unsigned>(params.window.plan.requests);
  const TokenFields fields(params.window.plan);
  const Tail& tail = params.entries.compressor.tail;
  const bool deep = tail.geometry.depth > 0;
  const auto launch_csa = [&](auto kernel) {
    kernel<<<dim3(requests, 2), EntryThreads::kThreads, 0, stream>>>(params, fields);
  };
  if (tail.data == nullptr) {
    update_swa_kernel<RowT><<<requests, EntryThreads::kThreads, 0, stream>>>(params, fields);
  } else if (tail.geometry.overlaps()) {
    launch_csa(deep ? update_csa_kernel<RowT, T, true> : update_csa_kernel<RowT, T, false>);
  } else if (tail.running) {
    update_running_kernel<RowT, T><<<requests, kRowThreads + EntryThreads::kThreads, 0, stream>>>(params, fields);
  } else if (deep) {
    launch_hca_decode<RowT, T, true>(stream, params, fields);
  } else {
    launch_hca_decode<RowT, T, false>(stream, params, fields);
  }
  return cudaGetLastError();
}

}  // namespace dsv4::cuda
