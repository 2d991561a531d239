// An HCA entry on the GPU, by a cluster of thread blocks.
//
// Each block makes a share of the channels, four a thread. Its threads pool neighbouring groups of rows; what the
// threads of a channel have merges pairwise through shared memory, in the order of ffi/common/pooling.h. The blocks
// tell each other no more than the row's sum of squares and its amax.
#pragma once

#include <cooperative_groups.h>

#include "window.cuh"

namespace dsv4::cuda {

// A thread's place among the kRanks blocks of kThreads threads that make an entry.
template <int kRanks, int kThreads>
struct HcaThread {
  static constexpr int kRowThreads = kHeadDim / 4 / kRanks;  // of a block, that share a row
  static constexpr int kSplits = kThreads / kRowThreads;
  static constexpr int kGroups = kHcaRatio / kGroupRows / kSplits;  // groups a thread pools

  int rank = static_cast<int>(blockIdx.x) % kRanks;
  int split = static_cast<int>(threadIdx.x) / kRowThreads;
  int thread = static_cast<int>(threadIdx.x) % kRowThreads;

  __device__ HcaThread() {}
  __device__ __forceinline__ int channel() const { return 4 * (rank * kRowThreads + thread); }
  __device__ __forceinline__ bool finishes() const { return split == 0; }

  // Waits for all threads of the cluster.
  __device__ __forceinline__ void sync() const { cooperative_groups::this_cluster().sync(); }
};

constexpr int kHcaThreads = 512;  // where all rows are loaded at once

// A value of each warp of a row, which every block of the cluster has.
struct alignas(16) OfRow {
  float values[kHeadDim / kQuadChannels];

  // Gives the value of the warp that has `channel` to all blocks; it is there after their next barrier.
  template <int kRanks, int kThreads>
  __device__ __forceinline__ void tell(float value, int channel, const HcaThread<kRanks, kThreads>&) {
    const int lane = channel / 4 % kWarp;
    if (lane < kRanks) {
      cooperative_groups::this_cluster().map_shared_rank(this, lane)->values[channel / kQuadChannels] = value;
    }
  }

  // A balanced tree.
  template <class Merge>
  __device__ __forceinline__ float over_warps(Merge&& merge) const {
    return merge(merge(values[0], values[1]), merge(values[2], values[3]));
  }
};

// Pools a thread's groups, each by `pool_one(group)`, and merges them as pairs, then pairs of pairs.
template <class At, class PoolOne>
__device__ __forceinline__ Partials<4> pool_groups(const At& at, PoolOne&& pool_one) {
  static_assert(At::kGroups <= 4);
  Partials<4> partial, pair;
#pragma unroll 1
  for (int i = 0; i < At::kGroups; ++i) {  // registers hold the rows of one group at a time
    const Partials<4> one = pool_one(At::kGroups * at.split + i);
    pair = i % 2 == 0 ? one : merge(pair, one);
    if (i <= 1) partial = pair;
    if (i == 3) partial = merge(partial, pair);
  }
  return partial;
}

// The same of rows that are in the tail or came with this step, for the window that token `index` closes.
template <class T, class At>
__device__ __forceinline__ Partials<4> pool_hca_rows(const Compressor& compressor, int64_t layer, const Token& closing,
                                                     int index, const At& at) {
  return pool_groups(at, [&](int group) {
    return pool_rows<kHeadDim, kHcaRatio, T>(compressor.tail, compressor.projections, layer, closing, index, group,
                                             at.channel());
  });
}

// Merges what kCount neighbouring splits have of a channel, `of(i)` being that of split i.
template <int kCount, class Of>
__device__ __forceinline__ Partials<4> merge_splits(Of&& of, int first = 0) {
  if constexpr (kCount == 1) {
    return of(first);
  } else {
    return merge(merge_splits<kCount / 2>(of, first), merge_splits<kCount / 2>(of, first + kCount / 2));
  }
}

// Makes entry `row` of the step of what the threads have pooled. All threads of the cluster call it. Those that finish
// have `amax(x, channel)` asked, then `store(x, channel, row_amax)` called, each for its four channels.
template <class At, class Amax, class Store>
__device__ __forceinline__ void finish_hca_entry(const Compressor& compressor, int row, const At& at,
                                                 const Partials<4>& partial, Amax&& amax, Store&& store) {
  __shared__ Partials<4> partials[At::kSplits][At::kRowThreads];
  __shared__ OfRow sums, amaxes;
  const int channel = at.channel();
  Finish finish;
  if (at.finishes()) {
    const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
    finish = Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
  } else {
    partials[at.split][at.thread] = partial;
  }
  at.sync();

  float x[4];
  if (at.finishes()) {
    pooled(merge_splits<At::kSplits>([&](int i) { return i == 0 ? partial : partials[i][at.thread]; }), x);
    sums.tell(sum_over_lanes(square_sum(x)), channel, at);
  }
  at.sync();
  if (at.finishes()) {
    const float sum = sums.over_warps([](float a, float b) { return a + b; });
    finish.apply<kHeadDim>(x, sum, compressor.eps, channel);
    amaxes.tell(max_over_lanes<kWarp>(amax(x, channel)), channel, at);
  }
  at.sync();
  if (at.finishes()) store(x, channel, amaxes.over_warps(max_ignoring_nan));
}

}  // namespace dsv4::cuda
