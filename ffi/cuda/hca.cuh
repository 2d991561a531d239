// An HCA entry on the GPU, by one thread block.
//
// A thread owns four channels and pools neighbouring groups of rows; what the threads of a channel have merges pairwise
// through shared memory, in the order of ffi/common/pooling.h.
#pragma once

#include "window.cuh"

namespace dsv4::cuda {

constexpr int kHcaThreads = 512;

// A thread's place in the block that makes an entry.
struct HcaThread {
  static constexpr int kRowThreads = kHeadDim / 4;
  static constexpr int kSplits = kHcaThreads / kRowThreads;
  static constexpr int kGroups = kHcaRatio / kGroupRows / kSplits;  // groups a thread pools

  int split = static_cast<int>(threadIdx.x) / kRowThreads;
  int thread = static_cast<int>(threadIdx.x) % kRowThreads;

  __device__ HcaThread() {}
  __device__ __forceinline__ int channel() const { return thread * 4; }
};

// Makes the entry that token `index` closes, entry `row` of the step. All threads of the block call it. Those of split
// 0 have `amax(x, channel)` asked, then `store(x, channel, row_amax)` called, each for its four channels.
template <class T, class Amax, class Store>
__device__ __forceinline__ void hca_entry(const Compressor& compressor, int64_t layer, const Token& closing, int index,
                                          int row, const HcaThread& at, Amax&& amax, Store&& store) {
  using At = HcaThread;
  __shared__ Partial4 partials[At::kSplits][At::kRowThreads];
  __shared__ float sums[At::kRowThreads / kWarp], amaxes[At::kRowThreads / kWarp];
  const int channel = at.channel(), warp = at.thread / kWarp;
  const bool finishes = at.split == 0, leads = finishes && at.thread % kWarp == 0;

  static_assert(At::kGroups == 4, "merged as pairs, then pairs of pairs");
  Partial4 partial, pair;
#pragma unroll 1
  for (int group = 0; group < At::kGroups; ++group) {  // registers hold the rows of one group at a time
    const Partial4 one = pool_rows<kHeadDim, kHcaRatio, T>(compressor.tail, compressor.projections, layer, closing,
                                                           index, At::kGroups * at.split + group, channel);
    pair = group % 2 == 0 ? one : merge4(pair, one);
    if (group == 1) partial = pair;
    if (group == 3) partial = merge4(partial, pair);
  }
#pragma unroll
  for (int step = 1; step < At::kSplits; step *= 2) {
    if (at.split % (2 * step) == step) partials[at.split][at.thread] = partial;
    __syncthreads();
    if (at.split % (2 * step) == 0) partial = merge4(partial, partials[at.split + step][at.thread]);
  }

  float x[4];
  Finish finish;
  if (finishes) {
    const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
    finish = Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
    pooled4(partial, x);
    const float sum = sum_over_lanes(square_sum(x));
    if (leads) sums[warp] = sum;
  }
  __syncthreads();
  if (finishes) {
    finish.apply<kHeadDim>(x, (sums[0] + sums[1]) + (sums[2] + sums[3]), compressor.eps, channel);
    const float of_warp = max_over_lanes<kWarp>(amax(x, channel));
    if (leads) amaxes[warp] = of_warp;
  }
  __syncthreads();
  if (finishes) {
    store(x, channel, max_ignoring_nan(max_ignoring_nan(amaxes[0], amaxes[1]), max_ignoring_nan(amaxes[2], amaxes[3])));
  }
  __syncthreads();  // none begins another window before all have read the shared memory
}

}  // namespace dsv4::cuda
