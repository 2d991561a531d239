// Pooling an HCA window with a cluster of thread blocks: its 16 groups of rows are spread over 8 blocks of 2 x 128 threads,
// so that a step with few closing windows still reads them with many multiprocessors.
#pragma once

#include <cooperative_groups.h>

#include "window.cuh"

namespace dsv4::cuda {

constexpr int kClusterBlocks = 8;
constexpr int kRowThreads = kHeadDim / 4;
constexpr int kClusterThreads = 2 * kRowThreads;
static_assert(2 * kClusterBlocks * kGroupRows == kHcaRatio, "every thread pools one group");

// Pools the window that token `index` closes. All threads of the cluster call it; the first 128 threads of its first block
// get the result. No thread leaves before all have read the tail.
template <class T>
__device__ __forceinline__ Partial4 pool_with_cluster(const Compressor& compressor, int64_t layer, const Token& closing,
                                                      int index) {
  __shared__ Partial4 partials[kRowThreads];
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank(), half = threadIdx.x / kRowThreads, thread = threadIdx.x % kRowThreads;
  Partial4 partial = pool_rows<T>(compressor.tail, compressor.projections, layer, closing, index, 2 * rank + half, 4 * thread);
  if (half == 1) partials[thread] = partial;
  __syncthreads();
  if (half == 0) partials[thread] = partial = merge4(partial, partials[thread]);
  cluster.sync();
  if (rank == 0 && half == 0) {
    const auto of = [&](int block) { return cluster.map_shared_rank(partials, block)[thread]; };
    const Partial4 low = merge4(merge4(partial, of(1)), merge4(of(2), of(3)));
    const Partial4 high = merge4(merge4(of(4), of(5)), merge4(of(6), of(7)));
    partial = merge4(low, high);
  }
  cluster.sync();
  return partial;
}

}  // namespace dsv4::cuda
