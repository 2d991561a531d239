// Per-request state on the GPU: begin_step, append_window, append_tail, rotate.

#include "cuda/close/running.cuh"
#include "cuda/core/launch.cuh"
#include "cuda/state/tail.cuh"
#include "cuda/state/window.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

constexpr int kThreads = 256;

constexpr int kTables = 2;

// What a slot owns, by one warp: its rows of the tables (items 0 and 1), then its window positions in each layer.
__device__ void reset_item(const BeginStepParams& params, int64_t item, int slot, int lane) {
  int32_t* values = (item == 0 ? params.block_table : params.write_table) + int64_t{slot} * params.max_blocks;
  int count = params.max_blocks;
  if (item >= kTables) {
    values = params.window_positions + ((item - kTables) * params.slots + slot) * params.ring;
    count = params.ring;
  }
  for (int i = lane; i < count; i += kWarp) values[i] = -1;
}

// A warp sees at one glance which of 32 requests reset their slots: in most steps none does. blockIdx.x is the item,
// the blocks of an item share the requests. All share the copying.
__global__ void __launch_bounds__(kThreads) begin_step_kernel(BeginStepParams params) {
  const Plan& plan = params.plan;
  const int lane = threadIdx.x % kWarp, share = blockIdx.y * kThreads + threadIdx.x, threads = gridDim.y * kThreads;
  for (int first = share - lane; first < plan.requests; first += threads) {
    int slot = -1;
    if (first + lane < plan.requests && plan.request_reset()[first + lane] != 0) {
      slot = plan.request_slot()[first + lane];
    }
    unsigned resets = __ballot_sync(kAllLanes, slot >= 0 && slot < params.slots);
    for (; resets != 0; resets &= resets - 1) {
      reset_item(params, blockIdx.x, __shfl_sync(kAllLanes, slot, __ffs(resets) - 1), lane);
    }
  }
  const int64_t size = plan.size(), copied = int64_t{gridDim.x} * threads;
  for (int64_t i = int64_t{blockIdx.x} * threads + share; i < size; i += copied) params.plan_copy[i] = plan.packed[i];
}

__global__ void table_changes_kernel(BeginStepParams params) {
  const int change = blockIdx.x * blockDim.x + threadIdx.x;
  if (change >= params.plan.table_changes()) return;
  const int64_t slot = params.plan.table_slot()[change];
  const int index = params.plan.table_index()[change];
  if (slot < 0 || slot >= params.slots || index < 0 || index >= params.max_blocks) return;
  const int block = params.plan.table_block()[change];
  params.block_table[slot * params.max_blocks + index] = block;
  params.write_table[slot * params.max_blocks + index] = block;
}

// One warp a token.
template <class Codec, class T>
__global__ void append_window_kernel(AppendWindowParams params) {
  const int index = blockIdx.x * kRowWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Pool& window = params.window;
  const int64_t layer = *params.layer;
  const Token token = token_at(params.plan, index, static_cast<int>(window.pages));
  if (!token.valid || token.position < token.next - window.rows || layer < 0 || layer >= window.layers) return;
  WarpRow<Codec::kWidth> row;
#pragma unroll
  for (int q = 0; q < row.kQuads; ++q) {
    load_values(static_cast<const T*>(params.rows) + static_cast<int64_t>(index) * Codec::kWidth + channel_of(q, lane),
                row.x[q]);
  }
  store_in_ring<Codec>(window, params.positions, layer, token, row, lane);
}

// One block a token, four channels a thread.
template <class T>
__global__ void append_tail_kernel(AppendTailParams params) {
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const Token token = token_at(params.plan, blockIdx.x, tail.slots);
  if (!token.valid || layer < 0 || layer >= tail.layers) return;
  append_token<T, 4>(tail, params.projections, layer, token, blockIdx.x, 4 * threadIdx.x);
}

// One block a request.
template <class T>
__global__ void __launch_bounds__(RunningThreads::kThreads) append_running_kernel(AppendTailParams params) {
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const Request request = request_at(params.plan, blockIdx.x, tail.slots);
  if (!request.valid || layer < 0 || layer >= tail.layers) return;
  const RunningThreads threads{static_cast<int>(threadIdx.x), Barrier::kEntryRow, nullptr};
  append_running<T, kRowsInFlight>(tail, params.projections, layer, request, params.plan.query_start()[blockIdx.x + 1],
                                   threads);
}

// One block a request and tail row, four channels a thread.
__global__ void rotate_kernel(RotateParams params) {
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const Request request = request_at(params.plan, blockIdx.x, tail.slots);
  const TailGeometry& geometry = tail.geometry;
  const int row = blockIdx.y;
  if (!request.valid || layer < 0 || layer >= tail.layers) return;
  const int channel = 4 * threadIdx.x;
  if (tail.running) {
    if (!state_in_use(tail, row, request.next)) {
      Partials<4> cleared;
#pragma unroll
      for (int i = 0; i < 4; ++i) cleared.set(i, {kClearedScore, 0.0f, 0.0f});
      store_state(running_state(tail, layer, request.slot, row) + channel, cleared);
    }
    return;
  }
  if (geometry.earliest_window(request.start) == geometry.earliest_window(request.next)) return;
  if (geometry.row_in_use(row, request.next)) return;
  const float kv[4] = {}, score[4] = {kClearedScore, kClearedScore, kClearedScore, kClearedScore};
  store_values(tail_row(tail, layer, request.slot, 0, row) + channel, kv);
  store_values(tail_row(tail, layer, request.slot, 1, row) + channel, score);
}

}  // namespace

const char* begin_step(CUstream_st* stream, const BeginStepParams& params) {
  const dim3 grid(kTables + static_cast<unsigned>(params.window_layers),
                  blocks_for(std::max(params.plan.requests, 1), kThreads));
  begin_step_kernel<<<grid, kThreads, 0, stream>>>(params);
  const int changes = params.plan.table_changes();
  if (changes > 0) table_changes_kernel<<<blocks_for(changes, kThreads), kThreads, 0, stream>>>(params);
  return launch_error("begin_step");
}

const char* append_window(CUstream_st* stream, const AppendWindowParams& params) {
  if (params.plan.tokens == 0) return nullptr;
  visit_codec(params.window.width, params.window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (Codec::kWidth == kHeadDim) {
      with_element(params.element, [&](auto element) {
        append_window_kernel<Codec, decltype(element)>
            <<<blocks_for(params.plan.tokens, kRowWarps), kRowWarps * kWarp, 0, stream>>>(params);
      });
    }
  });
  return launch_error("append_window");
}

const char* append_tail(CUstream_st* stream, const AppendTailParams& params) {
  if (params.plan.tokens == 0) return nullptr;
  with_element(params.projections.element, [&](auto element) {
    using T = decltype(element);
    if (params.tail.running) {
      if (params.plan.requests > 0) {
        append_running_kernel<T><<<params.plan.requests, RunningThreads::kThreads, 0, stream>>>(params);
      }
      return;
    }
    append_tail_kernel<T><<<params.plan.tokens, params.tail.width / 4, 0, stream>>>(params);
  });
  return launch_error("append_tail");
}

const char* rotate(CUstream_st* stream, const RotateParams& params) {
  if (params.plan.requests == 0) return nullptr;
  const TailGeometry& geometry = params.tail.geometry;
  const dim3 grid(params.plan.requests, params.tail.running ? geometry.depth + 1 : geometry.rows());
  rotate_kernel<<<grid, params.tail.width / 4, 0, stream>>>(params);
  return launch_error("rotate");
}

}  // namespace dsv4::cuda
