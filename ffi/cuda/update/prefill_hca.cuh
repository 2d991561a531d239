// Prefill, HCA: a cluster of two blocks closes a window, each half of its rows; where there are no clusters, one block
// does. More blocks store the rows that survive.
//
// Threads: 512 or 256 a block, each four channels of a share of the window's rows (HcaThread); the first block's first
// 128 finish the entry, then all move the tail on. In another block a warp stores a row.
// Barriers: __syncthreads, the cluster's, and kEntryRow among the threads that finish (finish_hca_entry).
// Shared memory: what splits and blocks hand over, 18 KiB (6 with 256 threads) and 6 KiB a block of the cluster.
// Registers that the launch bounds leave a thread: 128.
#pragma once

#include "cuda/update/prefill.cuh"

namespace dsv4::cuda {

// A block fills a multiprocessor where all windows find place at once. Where they do not, two share it, so that one
// loads rows while the other finishes its entry.
template <class RowT, class T, int kRanks, int kThreads, bool kDeep>
__global__ void DSV4_CLUSTER_DIMS(kRanks) __launch_bounds__(kThreads, kHcaThreads / kThreads)
    prefill_hca_kernel(const __grid_constant__ UpdateParams params, int rows, LastTokens last) {
  using At = HcaThread<kRanks, kThreads>;
  if constexpr (!At::kCompiled) return;
  const int row = blockIdx.x / kRanks;
  if (row >= rows) {
    constexpr int kWarps = kThreads / kWarp;
    const int closing = rows * kRanks, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    append_last_tokens<RowT, T, kHcaRatio, kDeep>(params, last, (blockIdx.x - closing) * kWarps + warp,
                                                  (gridDim.x - closing) * kWarps, lane);
    return;
  }
  const ClosingWindow window = look_up<kHcaRatio>(params, row);
  if (window.kind == ClosingWindow::kNone) return;

  const At at;
  at.begin();
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio, kDeep>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int64_t layer = *params.kind_layer;
  const Partials<4> partial = pool_hca_rows<T>(compressor, layer, window.closing, window.index, at);
  store_hca_entry(compressor, pool, {window.entry_page, window.row}, row, at, partial);
  if (window.kind == ClosingWindow::kTail) {
    move_tail_on<T, At::kRanks * At::kSplits, 8, 4>(compressor.tail, compressor.projections, layer, window.closing,
                                                    window.index, at.rank * At::kSplits + at.split, at.channel());
  }
}

}  // namespace dsv4::cuda
