// Prefill, HCA with a running tail: a block closes a window, or moves a request's state on.
#pragma once

#include "prefill.cuh"

namespace dsv4::cuda {

// The first `rows` blocks close windows, the others own a request each. A state that a closing window goes on from is
// moved on by the block that closes it, any other by its request's block.
template <class T>
__global__ void __launch_bounds__(kRowThreads) prefill_running_kernel(UpdateParams params, int rows) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const RowThreads<kHeadDim> threads{static_cast<int>(threadIdx.x), 1, scratch};
  const Plan& plan = params.window.plan;
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int64_t layer = *params.kind_layer;
  if (!has_layer(pool, layer)) return;
  const auto append = [&](const Request& request, int end) {
    append_running<T, kRowsInFlight>(compressor.tail, compressor.projections, layer, request, end, threads.channel());
  };
  const int row = blockIdx.x;
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
