// An HCA entry on the GPU, by a cluster of thread blocks, or where there are no clusters by one block.
//
// Threads: a block's are kSplits groups of 128, four channels a thread. Barriers: __syncthreads between the groups, the
// cluster's between the blocks, kEntryRow among the 128 threads that finish. Shared memory (finish_hca_entry): partials
// of 128 threads, 48 bytes each, from all groups but the first, and from all blocks.
//
// Each block pools a share of the window's rows, whole rows, four channels a thread; each thread pools neighbouring
// groups of rows. What the threads of a channel have merges pairwise, within the block, then between blocks, in the
// order of ffi/math/pooling.h; the first block finishes the entry.
#pragma once

#include "cuda/close/window.cuh"

namespace dsv4::cuda {

// A thread's place among the kRanks blocks of kThreads threads that make an entry.
template <int kRanks_, int kThreads>
struct HcaThread : ClusterBarrier<kRanks_> {
  static constexpr int kRanks = kRanks_;
  static constexpr int kSplits = kThreads / kRowThreads;
  static constexpr int kGroups = kHcaRatio / kGroupRows / kRanks / kSplits;  // groups a thread pools

  int rank = static_cast<int>(blockIdx.x % kRanks);
  int split = static_cast<int>(threadIdx.x / kRowThreads);
  int thread = static_cast<int>(threadIdx.x % kRowThreads);

  __device__ HcaThread() {}
  __device__ __forceinline__ int channel() const { return 4 * thread; }
  __device__ __forceinline__ int first_group() const { return kGroups * (kSplits * rank + split); }
  __device__ __forceinline__ bool finishes() const { return rank == 0 && split == 0; }
};

constexpr int kHcaThreads = 512;  // four blocks of as many have all rows on their way at once

// Pools a thread's groups of the window that token `index` closes, and merges them as pairs, then pairs of pairs.
template <class T, class At>
__device__ __forceinline__ Partials<4> pool_hca_rows(const Compressor& compressor, int64_t layer, const Token& closing,
                                                     int index, const At& at) {
  static_assert(At::kGroups <= 4);
  Partials<4> partial, pair;
#pragma unroll 1
  for (int i = 0; i < At::kGroups; ++i) {  // registers hold the rows of one group at a time
    const Partials<4> one = pool_rows<kHeadDim, kHcaRatio, T, 4>(compressor.tail, compressor.projections, layer,
                                                                 closing, index, at.first_group() + i, at.channel());
    pair = i % 2 == 0 ? one : merge(pair, one);
    if (i <= 1) partial = pair;
    if (i == 3) partial = merge(partial, pair);
  }
  return partial;
}

// Merges what kCount neighbours have of a channel, `of(i)` being that of the i-th.
template <int kCount, class Of>
__device__ __forceinline__ Partials<4> merge_neighbours(Of&& of, int first = 0) {
  if constexpr (kCount == 1) {
    return of(first);
  } else {
    return merge(merge_neighbours<kCount / 2>(of, first), merge_neighbours<kCount / 2>(of, first + kCount / 2));
  }
}

// Makes entry `row` of the step of what the threads of a cluster have pooled, all of which call it after `begin`. Calls
// `store(x, threads)` where it finishes, `x` being four channels of the entry. All reads of the rows are then done.
template <class At, class Store>
__device__ __forceinline__ void finish_hca_entry(const Compressor& compressor, int row, const At& at,
                                                 Partials<4> partial, Store&& store) {
  // What the first split, and the first block, do not have themselves.
  __shared__ Partials<4> of_splits[At::kSplits - 1][kRowThreads], of_ranks[At::kRanks][kRowThreads];
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  Finish finish;
  if (at.split != 0) of_splits[at.split - 1][at.thread] = partial;
  if (at.finishes()) {
    finish =
        Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, at.channel());
  }
  __syncthreads();
  at.wait();
  if (at.split == 0) {
    partial = merge_neighbours<At::kSplits>([&](int i) { return i == 0 ? partial : of_splits[i - 1][at.thread]; });
    if (at.rank != 0) *at.of_first_block(&of_ranks[at.rank][at.thread]) = partial;
  }
  at.sync();
  if (!at.finishes()) return;
  const RowThreads<kHeadDim> threads{at.thread, Barrier::kEntryRow, scratch};
  float x[4];
  pooled(merge_neighbours<At::kRanks>([&](int i) { return i == 0 ? partial : of_ranks[i][at.thread]; }), x);
  finish.apply<kHeadDim>(x, threads.sum(square_sum(x)), compressor.eps, at.channel());
  store(x, threads);
}

}  // namespace dsv4::cuda
