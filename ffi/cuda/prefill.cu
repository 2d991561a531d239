// Prefill: the writes of one layer in a step with more tokens than requests.
//
// Two launches: one closes windows, the next stores the rows that survive.

#include "update.cuh"

namespace dsv4::cuda {
namespace {

// Prefill, CSA: one block a closing window, four warps on the entry, one on the indexer key.
template <class T>
__global__ void __launch_bounds__(kRowThreads + kWarp) close_csa_kernel(UpdateParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int row = blockIdx.x, thread = threadIdx.x;
  const Plan& plan = params.window.plan;
  const int64_t layer = *params.kind_layer;
  const int index = plan.closing(kCsaRatio)[row];
  const Token closing = token_at(plan, index, params.table.slots);
  if (!closing.valid || !has_layer(params.entries.pool, layer)) return;
  constexpr int kRows = kBlockTokens / kCsaRatio;
  if (thread < kRowThreads) {
    close_csa_window<kHeadDim, T>(with_constants<kHeadDim, kCsaRatio>(params.entries.compressor),
                                  with_rows<kRows>(params.entries.pool), params.table, layer, closing, index, row,
                                  {thread, 1, scratch});
  } else {
    close_csa_window<kKeyDim, T>(with_constants<kKeyDim, kCsaRatio>(params.keys.compressor),
                                 with_rows<kRows>(params.keys.pool), params.table, layer, closing, index, row,
                                 {thread % kWarp, 0, nullptr});
  }
}

constexpr int kPrefillBlocks = 2;

// Prefill, HCA: one cluster a closing window.
template <class T>
__global__ void __cluster_dims__(kPrefillBlocks, 1, 1) __launch_bounds__(kHcaThreads)
    close_hca_kernel(UpdateParams params) {
  const int row = blockIdx.x / kPrefillBlocks;
  const Plan& plan = params.window.plan;
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const int64_t layer = *params.kind_layer;
  const int index = plan.closing(kHcaRatio)[row];
  const Token closing = token_at(plan, index, params.table.slots);
  if (!closing.valid || !has_layer(pool, layer)) return;
  close_hca_window<T>(with_constants<kHeadDim, kHcaRatio>(params.entries.compressor), pool, params.table, layer,
                      closing, index, row, HcaThread<kPrefillBlocks>{});
}

constexpr int kAppendTokens = 8;  // tokens of a block, a warp each for their window rows and indexer halves
constexpr int kAppendThreads = kAppendTokens * kWarp;

// Prefill: the last tokens of each request, newest first; blockIdx.y walks back by eight.
template <class RowT, class T>
__global__ void __launch_bounds__(kAppendThreads) append_last_tokens_kernel(UpdateParams params) {
  const Plan& plan = params.window.plan;
  const Request request = request_at(plan, blockIdx.x, static_cast<int>(params.window.window.pages));
  if (!request.valid) return;
  const int end = plan.query_start()[blockIdx.x + 1], count = request.next - request.start;
  const int first = blockIdx.y * kAppendTokens, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto token_back = [&](int back) {
    return Token{back < count, request.slot, request.next - 1 - back, request.start, request.next};
  };

  const int64_t window_layer = *params.window.layer;
  const Token mine = token_back(first + warp);
  if (mine.valid && first + warp < params.window.window.rows && has_layer(params.window.window, window_layer)) {
    const int index = end - 1 - (first + warp);
    store_window_row(params, window_layer, mine, index, load_window_row<RowT>(params, index, lane), lane);
  }

  if (params.entries.compressor.tail.data == nullptr) return;
  const int64_t layer = *params.kind_layer;
  if (!has_layer(params.entries.pool, layer)) return;
  const auto append = [&](const Compressor& compressor, int back, int channel) {
    const Token token = token_back(back);
    const TailGeometry& geometry = compressor.tail.geometry;
    if (!token.valid || !(geometry.overlap_survives(token.position, token.next) ||
                          geometry.current_survives(token.position, token.next))) {
      return;
    }
    append_token<T>(compressor.tail, compressor.projections, layer, token, end - 1 - back, channel);
  };
  if (params.keys.compressor.tail.data != nullptr) append(params.keys.compressor, first + warp, 4 * lane);
  constexpr int kAtOnce = kAppendThreads / kRowThreads;
  for (int i = threadIdx.x / kRowThreads; i < kAppendTokens; i += kAtOnce) {
    append(params.entries.compressor, first + i, 4 * (threadIdx.x % kRowThreads));
  }
}

}  // namespace

template <class RowT, class T>
void launch_prefill(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const Tail& tail = params.entries.compressor.tail;
  int rows = params.window.window.rows;
  if (tail.data != nullptr) {
    const TailGeometry& geometry = tail.geometry;
    const unsigned closing = static_cast<unsigned>(closing_capacity(plan.tokens, plan.requests, geometry.ratio));
    if (closing > 0 && geometry.overlaps()) close_csa_kernel<T><<<closing, kRowThreads + kWarp, 0, stream>>>(params);
    if (closing > 0 && !geometry.overlaps()) {
      close_hca_kernel<T><<<closing * kPrefillBlocks, kHcaThreads, 0, stream>>>(params);
    }
    rows = std::max(rows, geometry.rows());
  }
  append_last_tokens_kernel<RowT, T>
      <<<dim3(plan.requests, blocks_for(std::min(plan.tokens, rows), kAppendTokens)), kAppendThreads, 0, stream>>>(
          params);
}

template void launch_prefill<float, float>(CUstream_st*, const UpdateParams&);
template void launch_prefill<float, bfloat16>(CUstream_st*, const UpdateParams&);
template void launch_prefill<bfloat16, float>(CUstream_st*, const UpdateParams&);
template void launch_prefill<bfloat16, bfloat16>(CUstream_st*, const UpdateParams&);

}  // namespace dsv4::cuda
