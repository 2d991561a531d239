// Prefill, HCA: a cluster of two blocks closes a window, each half of its rows. A warp copies its next group of rows
// while it merges one. More blocks store the rows that survive.
#pragma once

#include "prefill.cuh"

namespace dsv4::cuda {

constexpr int kHalves = 2;
constexpr int kHalfWarps = 8;
using HalfThread = HcaThread<kHalves, kHalfWarps * kWarp>;

template <class T>
constexpr int kHalfBytes = kHalfWarps * Landing<kHeadDim, kHcaRatio, T>::kBytes;

template <class RowT, class T>
__global__ void __cluster_dims__(kHalves, 1, 1) __launch_bounds__(kHalfWarps* kWarp, 2)
    prefill_hca_kernel(const __grid_constant__ UpdateParams params, int rows, LastTokens last) {
  using Rows = Landing<kHeadDim, kHcaRatio, T>;
  extern __shared__ uint4 landings[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = blockIdx.x / kHalves;
  if (row >= rows) {
    const int closing = rows * kHalves;
    append_last_tokens<RowT, T, kHcaRatio>(params, last, (blockIdx.x - closing) * kHalfWarps + warp,
                                           (gridDim.x - closing) * kHalfWarps, lane);
    return;
  }
  const HalfThread at;
  const Plan& plan = params.window.plan;
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Projections& in = compressor.projections;
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int channel = at.channel();

  const int index = plan.closing(kHcaRatio)[row], first = index - (kHcaRatio - 1);
  const Rows landed{reinterpret_cast<char*>(landings) + warp * Rows::kBytes};
  // Whether a window is valid, and where its rows are, is known later: rows of this step can be read at any rate.
  const auto copy = [&](int group) {
    if (first >= 0 && index < plan.tokens) {
      landed.copy(in, first + group * kGroupRows, channel - 4 * lane, lane);
    }
    commit_copies();
  };
  copy(at.first_group());
  float bias[kGroupRows][4];
  Rows::load_bias(in, at.first_group(), channel, bias);
  const ClosingWindow window = look_up<kHcaRatio>(params, row);
  if (window.kind == ClosingWindow::kNone) return;

  Partials<4> partial;
  if (window.kind == ClosingWindow::kStep) {
    partial = pool_groups(at, [&](int group) {
      wait_copies<0>();
      const Partials<4> one = landed.pool(bias, lane);
      __syncwarp();
      if ((group + 1) % at.kGroups != 0) {
        copy(group + 1);
        Rows::load_bias(in, group + 1, channel, bias);
      }
      return one;
    });
  } else {
    partial = pool_hca_rows<T>(compressor, *params.kind_layer, window.closing, index, at);
  }
  store_hca_entry(compressor, pool, {window.entry_page, window.row}, row, at, partial);
  if (window.kind == ClosingWindow::kTail) {
    move_tail_on<kHcaRatio, HalfThread::kRanks * HalfThread::kSplits, 8, T>(
        compressor, *params.kind_layer, window.closing, index, at.rank * at.kSplits + at.split, channel);
  }
}

}  // namespace dsv4::cuda
