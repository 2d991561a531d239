// Per-request state on the GPU: begin_step, append_window, append_tail, rotate.

#include "../common/kernels.h"
#include "launch.cuh"
#include "running.cuh"
#include "window.cuh"

namespace dsv4::cuda {
namespace {

constexpr int kThreads = 256;

__device__ void fill_kv_and_score(const Tail& tail, int64_t layer, int slot, int row, int64_t count, int64_t first,
                                  int64_t stride) {
  float* kv = tail_row(tail, layer, slot, 0, row);
  float* score = tail_row(tail, layer, slot, 1, row);
  for (int64_t i = first; i < count; i += stride) {
    reinterpret_cast<float4*>(kv)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    reinterpret_cast<float4*>(score)[i] = make_float4(kClearedScore, kClearedScore, kClearedScore, kClearedScore);
  }
}

__device__ void clear_tail(const Tail& tail, int64_t layer, int slot, int64_t first, int64_t stride) {
  if (!tail.running) {
    fill_kv_and_score(tail, layer, slot, 0, static_cast<int64_t>(tail.geometry.rows()) * tail.width / 4, first, stride);
    return;
  }
  float* state = running_state(tail, layer, slot);
  for (int64_t i = first; i < tail.width / 4; i += stride) store_state(state + 4 * i, empty_partials<4>());
}

// What a slot owns, item by item: its table row, then each layer of each pool. blockIdx.x is the item, blockIdx.y
// splits it.
__device__ void reset_item(const BeginStepParams& params, int slot, int64_t item, int split, int stride) {
  if (item == 0) {
    for (int i = split; i < params.max_blocks; i += stride) {
      params.block_table[static_cast<int64_t>(slot) * params.max_blocks + i] = -1;
    }
    return;
  }
  item -= 1;
  if (item < params.window_layers) {
    int32_t* positions = params.window_positions + (item * params.slots + slot) * params.ring;
    for (int i = split; i < params.ring; i += stride) positions[i] = -1;
    return;
  }
  item -= params.window_layers;
  for (const Tail& tail : params.tails) {
    if (item >= 0 && item < tail.layers) clear_tail(tail, item, slot, split, stride);
    item -= tail.layers;
  }
}

__global__ void begin_step_kernel(BeginStepParams params) {
  const int split = blockIdx.y * blockDim.x + threadIdx.x, stride = gridDim.y * blockDim.x;
  for (int first = 0; first < params.plan.requests; first += blockDim.x) {
    const int mine = first + threadIdx.x;
    // Most steps reset nothing: see that at one glance.
    if (!__syncthreads_or(mine < params.plan.requests && params.plan.request_reset()[mine] != 0)) continue;
    const int end = min(first + static_cast<int>(blockDim.x), params.plan.requests);
    for (int index = first; index < end; ++index) {
      const int slot = params.plan.request_slot()[index];
      if (slot < 0 || slot >= params.slots || params.plan.request_reset()[index] == 0) continue;
      reset_item(params, slot, blockIdx.x, split, stride);
    }
  }
}

__global__ void table_changes_kernel(BeginStepParams params) {
  const int change = blockIdx.x * blockDim.x + threadIdx.x;
  if (change >= params.plan.table_changes()) return;
  const int64_t slot = params.plan.table_slot()[change];
  const int index = params.plan.table_index()[change];
  if (slot < 0 || slot >= params.slots || index < 0 || index >= params.max_blocks) return;
  params.block_table[slot * params.max_blocks + index] = params.plan.table_block()[change];
}

// One warp a token.
template <class Codec, int kAlignment, class T>
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
  const int64_t page = layer * window.pages + token.slot;
  const int ring_row = token.position % window.rows;
  store_row<Codec, kAlignment>(stored_row<Codec>(window.data + page * window.page_bytes, window.rows, ring_row), row,
                               lane, window.global_scale);
  if (lane == 0) params.positions[page * window.rows + ring_row] = token.position;
}

// One block a token, four channels a thread.
template <class T>
__global__ void append_tail_kernel(AppendTailParams params) {
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const Token token = token_at(params.plan, blockIdx.x, tail.slots);
  if (!token.valid || layer < 0 || layer >= tail.layers) return;
  append_token<T>(tail, params.projections, layer, token, blockIdx.x, 4 * threadIdx.x);
}

// One block a request.
template <class T>
__global__ void __launch_bounds__(RunningThreads::kThreads) append_running_kernel(AppendTailParams params) {
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const Request request = request_at(params.plan, blockIdx.x, tail.slots);
  if (!request.valid || layer < 0 || layer >= tail.layers) return;
  const RunningThreads threads{static_cast<int>(threadIdx.x), 1, nullptr};
  append_running<T, kRowsInFlight>(tail, params.projections, layer, request, params.plan.query_start()[blockIdx.x + 1],
                                   threads);
}

// One block a request and tail row, four channels a thread.
__global__ void rotate_kernel(RotateParams params) {
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const Request request = request_at(params.plan, blockIdx.x, tail.slots);
  const int ratio = tail.geometry.ratio, row = blockIdx.y;
  if (!request.valid || request.start / ratio == request.next / ratio) return;
  if (layer < 0 || layer >= tail.layers) return;
  if (tail.running) {
    if (request.next % ratio == 0) clear_tail(tail, layer, request.slot, threadIdx.x, blockDim.x);
    return;
  }
  if (tail.geometry.row_in_use(row, request.next)) return;
  fill_kv_and_score(tail, layer, request.slot, row, tail.width / 4, threadIdx.x, blockDim.x);
}

}  // namespace

const char* begin_step(CUstream_st* stream, const BeginStepParams& params) {
  constexpr int kSplits = 8;
  const int64_t items =
      1 + params.window_layers + params.tails[0].layers + params.tails[1].layers + params.tails[2].layers;
  begin_step_kernel<<<dim3(static_cast<unsigned>(items), kSplits), kThreads, 0, stream>>>(params);
  const int changes = params.plan.table_changes();
  if (changes > 0) table_changes_kernel<<<blocks_for(changes, kThreads), kThreads, 0, stream>>>(params);
  return launch_error();
}

const char* append_window(CUstream_st* stream, const AppendWindowParams& params) {
  if (params.plan.tokens == 0) return nullptr;
  with_codec(params.window, [&](auto codec, auto alignment) {
    using Codec = decltype(codec);
    if constexpr (Codec::kWidth == kHeadDim) {
      with_element(params.element, [&](auto element) {
        append_window_kernel<Codec, decltype(alignment)::value, decltype(element)>
            <<<blocks_for(params.plan.tokens, kRowWarps), kRowWarps * kWarp, 0, stream>>>(params);
      });
    }
  });
  return launch_error();
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
  return launch_error();
}

const char* rotate(CUstream_st* stream, const RotateParams& params) {
  if (params.plan.requests == 0) return nullptr;
  const dim3 grid(params.plan.requests, params.tail.running ? 1 : params.tail.geometry.rows());
  rotate_kernel<<<grid, params.tail.width / 4, 0, stream>>>(params);
  return launch_error();
}

}  // namespace dsv4::cuda
