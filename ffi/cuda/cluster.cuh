// An HCA entry on the GPU, by a cluster of two thread blocks: each owns half of the channels and pools all 128 rows of
// them, so that the blocks exchange no more than the row's sum of squares and its amax.
//
// A block has eight rows of 64 threads. A thread owns four channels and pools two neighbouring groups of rows; the
// eight results merge pairwise through shared memory, in the order of ffi/common/pooling.h.
#pragma once

#include <cooperative_groups.h>

#include "window.cuh"

namespace dsv4::cuda {

constexpr int kClusterBlocks = 2;
constexpr int kHalfThreads = kHeadDim / 4 / kClusterBlocks;
constexpr int kHcaSplits = kHcaRatio / kGroupRows / 2;
constexpr int kHcaThreads = kHalfThreads * kHcaSplits;

// A thread's place in the cluster.
struct HcaThread {
  int rank = static_cast<int>(blockIdx.x) % kClusterBlocks;
  int split = static_cast<int>(threadIdx.x) / kHalfThreads;
  int thread = static_cast<int>(threadIdx.x) % kHalfThreads;

  __device__ HcaThread() {}
  __device__ __forceinline__ int channel() const { return (rank * kHalfThreads + thread) * 4; }
};

// Makes the entry that token `index` closes, entry `row` of the step. All threads of the cluster call it. Those of
// split 0 have `amax(x, channel)` asked, then `store(x, channel, row_amax)` called, each for its four channels.
template <class T, class Amax, class Store>
__device__ __forceinline__ void hca_entry(const Compressor& compressor, int64_t layer, const Token& closing, int index,
                                          int row, const HcaThread& at, Amax&& amax, Store&& store) {
  constexpr int kWarps = kHalfThreads / kWarp;
  __shared__ Partial4 partials[kHcaSplits][kHalfThreads];
  __shared__ float sums[kWarps], amaxes[kWarps];
  const auto cluster = cooperative_groups::this_cluster();
  const int channel = at.channel(), warp = at.thread / kWarp;
  const bool finishes = at.split == 0, leads = finishes && at.thread % kWarp == 0;

  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  Partial4 partial;
#pragma unroll 1
  for (int group = 0; group < 2; ++group) {  // registers hold the rows of one group at a time
    const Partial4 one = pool_rows<kHeadDim, kHcaRatio, T>(compressor.tail, compressor.projections, layer, closing, index,
                                                           2 * at.split + group, channel);
    partial = group == 0 ? one : merge4(partial, one);
  }
#pragma unroll
  for (int step = 1; step < kHcaSplits; step *= 2) {
    if (at.split % (2 * step) == step) partials[at.split][at.thread] = partial;
    __syncthreads();
    if (at.split % (2 * step) == 0) partial = merge4(partial, partials[at.split + step][at.thread]);
  }

  float x[4];
  Finish finish;
  if (finishes) {
    finish = Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
    pooled4(partial, x);
    const float sum = sum_over_lanes(square_sum(x));
    if (leads) sums[warp] = sum;
  }
  cluster.sync();
  if (finishes) {
    const float *low = cluster.map_shared_rank(sums, 0), *high = cluster.map_shared_rank(sums, 1);
    finish.apply<kHeadDim>(x, (low[0] + low[1]) + (high[0] + high[1]), compressor.eps, channel);
    const float of_warp = max_over_lanes<kWarp>(amax(x, channel));
    if (leads) amaxes[warp] = of_warp;
  }
  cluster.sync();
  if (finishes) {
    const float *low = cluster.map_shared_rank(amaxes, 0), *high = cluster.map_shared_rank(amaxes, 1);
    store(x, channel, max_ignoring_nan(max_ignoring_nan(low[0], low[1]), max_ignoring_nan(high[0], high[1])));
  }
  cluster.sync();  // no block leaves, and none begins another window, before the other has read its shared memory
}

}  // namespace dsv4::cuda
