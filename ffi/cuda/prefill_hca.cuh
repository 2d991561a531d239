// Prefill, HCA: a cluster of two blocks closes a window, each half of the channels: the two exchange no more than the
// row's sum of squares and its amax. Three quarters of a window are on their way at once.
#pragma once

#include <cooperative_groups.h>

#include "prefill.cuh"

namespace dsv4::cuda {

constexpr int kHalves = 2;
constexpr int kHalfWarps = kHeadDim / kHalves / kQuadChannels;  // of a row
constexpr int kSplits = 4;
constexpr int kHalfThreads = (kHalfWarps * kSplits + 1) * kWarp;
constexpr int kSplitGroups = kHcaRatio / kGroupRows / kSplits;
constexpr int kGroupsAhead = 3;

template <class T>
constexpr int kHalfBytes = kHalfWarps * kSplits * kGroupsAhead * Landing<kHeadDim, kHcaRatio, T>::kBytes;

// What the warps of a row tell each other, in the order of their channels.
struct alignas(16) OfRow {
  float values[kHalves * kHalfWarps];
};

// Gives `value` to both blocks; it is there after the next barrier of the cluster.
__device__ __forceinline__ void tell(OfRow* row, int warp, float value, int lane) {
  if (lane < kHalves) cooperative_groups::this_cluster().map_shared_rank(row, lane)->values[warp] = value;
}

template <class RowT, class T>
__global__ void __cluster_dims__(kHalves, 1, 1) __launch_bounds__(kHalfThreads, 1)
    prefill_hca_kernel(UpdateParams params, int rows, LastTokens last) {
  using Rows = Landing<kHeadDim, kHcaRatio, T>;
  extern __shared__ uint4 landings[];
  __shared__ Partial4 partials[kSplits][kHalfWarps * kWarp];
  __shared__ OfRow sums, amaxes;
  __shared__ ClosingWindow window;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = blockIdx.x / kHalves;
  if (warp == kHalfWarps * kSplits) {
    if (lane == 0) window = look_up<kHcaRatio>(params, row);
    arrive(kLookUpBarrier, kHalfThreads);
    append_last_tokens<RowT, T, kHcaRatio>(params, last, blockIdx.x, gridDim.x, lane);
    return;
  }
  const auto cluster = cooperative_groups::this_cluster();
  const Plan& plan = params.window.plan;
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Projections& in = compressor.projections;
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int split = warp / kHalfWarps;
  const int warp_of_row = blockIdx.x % kHalves * kHalfWarps + warp % kHalfWarps;
  const int channel = channel_of(warp_of_row, lane);

  const int index = plan.closing(kHcaRatio)[row], first = index - (kHcaRatio - 1);
  const auto landed = [&](int g) {
    return Rows{reinterpret_cast<char*>(landings) + (warp * kGroupsAhead + g % kGroupsAhead) * Rows::kBytes};
  };
  // Whether a window is valid, and where its rows are, is known later: rows of this step can be read at any rate.
  const auto copy = [&](int g) {
    if (g < kSplitGroups && first >= 0 && index < plan.tokens) {
      landed(g).copy(in, first + (split * kSplitGroups + g) * kGroupRows, channel_of(warp_of_row, 0), lane);
    }
    commit_copies();
  };
  Finish finish;
  if (split == 0) {
    const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
    finish = Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
  }
  float bias[kGroupRows][4];
  Rows::load_bias(in, split * kSplitGroups, channel, bias);
#pragma unroll 1
  for (int g = 0; g < kGroupsAhead; ++g) copy(g);
  sync_threads(kLookUpBarrier, kHalfThreads);
  const bool in_step = window.kind == ClosingWindow::kStep;
  if (window.kind == ClosingWindow::kNone) {
    wait_copies<0>();
    return;
  }
  if (split == 0) cluster.barrier_arrive();

  Partial4 partial, even;
#pragma unroll 1
  for (int g = 0; g < kSplitGroups; ++g) {
    const int group = split * kSplitGroups + g;
    wait_copies<kGroupsAhead - 1>();
    Partial4 one;
    if (in_step) {
      one = landed(g).pool(bias, lane);
    } else {
      one = pool_rows<kHeadDim, kHcaRatio, T>(compressor.tail, in, *params.kind_layer, window.closing, index, group,
                                              channel);
    }
    __syncwarp();
    copy(g + kGroupsAhead);
    if (g + 1 < kSplitGroups) Rows::load_bias(in, group + 1, channel, bias);
    if (g % 2 == 0) {
      even = one;
    } else {
      even = merge4(even, one);
      if (g == 1) {
        partial = even;
      } else {
        partial = merge4(partial, even);
      }
    }
  }
  const int thread = warp % kHalfWarps * kWarp + lane;
  if (split != 0) partials[split][thread] = partial;
  __syncthreads();
  if (!in_step) {
    move_tail_on<kHcaRatio, kSplits, 8, T>(compressor, *params.kind_layer, window.closing, index, split, channel);
  }
  if (split != 0) return;

  partial = merge4(merge4(partial, partials[1][thread]), merge4(partials[2][thread], partials[3][thread]));
  float x[4];
  pooled4(partial, x);
  const float sum = sum_over_lanes(square_sum(x));
  cluster.barrier_wait();  // both blocks are there to be told
  tell(&sums, warp_of_row, sum, lane);
  cluster.sync();
  finish.apply<kHeadDim>(x, (sums.values[0] + sums.values[1]) + (sums.values[2] + sums.values[3]), compressor.eps,
                         channel);
  tell(&amaxes, warp_of_row, max_over_lanes<kWarp>(amax_for<kHeadDim>(pool, x, channel)), lane);
  cluster.sync();
  store_entry<kHeadDim>(pool, {window.entry_page, window.row}, x, channel,
                        max_ignoring_nan(max_ignoring_nan(amaxes.values[0], amaxes.values[1]),
                                         max_ignoring_nan(amaxes.values[2], amaxes.values[3])));
}

}  // namespace dsv4::cuda
