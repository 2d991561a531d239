// Prefill, HCA with a running tail: a block closes a window, moves a request's state on, or stores window rows that
// survive.
//
// Threads: 256 a block, two channels of the row or the state each, 16 tokens' loads in flight twice; of the last kind
// of block, a warp stores a row. Barrier: kEntryRow, among all. Shared memory: two floats a warp. Registers: 255, of
// which the tokens in flight take most.
#pragma once

#include "cuda/update/prefill.cuh"

namespace dsv4::cuda {

// The first `rows` blocks close windows, the next own a request each, the others store window rows. A state that a
// closing window goes on from is moved on by the block that closes it, any other by its request's block.
template <class RowT, class T>
__global__ void __launch_bounds__(RunningThreads::kThreads)
    prefill_running_kernel(UpdateParams params, int rows, LastTokens last) {
  __shared__ float scratch[2 * RunningThreads::kWarps];
  const RunningThreads threads{static_cast<int>(threadIdx.x), Barrier::kEntryRow, scratch};
  const Plan& plan = params.window.plan;
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int row = blockIdx.x, states = rows + plan.requests;
  if (row >= states) {
    append_last_tokens<RowT, T, 0, false>(params, last, (row - states) * threads.kWarps + threads.thread / kWarp,
                                          (gridDim.x - states) * threads.kWarps, threads.thread % kWarp);
    return;
  }
  const int64_t layer = *params.kind_layer;
  if (!has_layer(pool, layer)) return;
  const auto append = [&](const Request& request, int end) {
    append_running<T, kRowsInFlight>(compressor.tail, compressor.projections, layer, request, end, threads);
  };
  if (row < rows) {
    const int index = plan.closing(kHcaRatio)[row];
    const Token closing = token_at(plan, index, params.table.slots);
    if (!closing.valid) return;
    close_running_window<T, kRowsInFlight>(compressor, pool, params.table, layer, closing, index, row, threads);
    if (!all_in_step<kHcaRatio>(closing)) {
      append({true, closing.slot, closing.start, closing.next}, index + closing.next - closing.position);
    }
  } else {
    const Request request = request_at(plan, row - rows, params.table.slots);
    if (!request.valid || closes_from_tail<kHcaRatio>(request.start, request.next)) return;
    append(request, plan.query_start()[row - rows + 1]);
  }
}

}  // namespace dsv4::cuda
