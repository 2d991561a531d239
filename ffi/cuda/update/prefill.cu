// Prefill: the writes of one layer in a step with more tokens than requests.
//
// One launch closes windows and stores the rows that survive; with CSA, where these are many, they are a launch of
// their own.

#include "cuda/update/prefill_csa.cuh"
#include "cuda/update/prefill_hca.cuh"
#include "cuda/update/prefill_running.cuh"

namespace dsv4::cuda {
namespace {

constexpr int kAppendWarps = 8;

// Nothing closes, or more rows survive than the closing kernels' blocks can store in passing.
template <class RowT, class T, int kRatio>
__global__ void __launch_bounds__(kAppendWarps* kWarp) append_last_tokens_kernel(UpdateParams params, LastTokens last) {
  append_last_tokens<RowT, T, kRatio>(params, last, blockIdx.x * kAppendWarps + threadIdx.x / kWarp,
                                      gridDim.x * kAppendWarps, threadIdx.x % kWarp);
}

// As many blocks as find place at once, `at_once`, or a multiple of it where runs would get too long.
int run_blocks(int rows, int64_t at_once) {
  return static_cast<int>(std::min<int64_t>(rows, at_once * blocks_for(rows, at_once * Runs::kEven)));
}

template <class RowT, class T, int kRatio>
void launch_append(CUstream_st* stream, const UpdateParams& params, const LastTokens& last) {
  append_last_tokens_kernel<RowT, T, kRatio>
      <<<blocks_for(last.count(), kAppendWarps), kAppendWarps * kWarp, 0, stream>>>(params, last);
}

template <class RowT, class T>
void launch_csa(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const LastTokens last = last_tokens<kCsaRatio>(params);
  const int rows = closing_capacity(plan.tokens, plan.requests, kCsaRatio);
  const int at_once = static_cast<int>(multiprocessors()) * kRunBlocks<T>, blocks = run_blocks(rows, at_once);
  const auto launch = [&](auto in_passing, int others, const LastTokens& tokens) {
    const auto kernel = prefill_csa_kernel<RowT, T, decltype(in_passing)::value>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRunBytes<T>);
    kernel<<<blocks + others, kRunThreads, kRunBytes<T>, stream>>>(params, Runs(rows, blocks), tokens);
  };
  // More blocks for the rows that survive where these find place too and no warp stores more than two tokens; else at
  // most four tokens in passing; else they are a launch of their own.
  const int left = at_once - blocks, others = blocks_for(last.count(), kRunWarps);
  if (others <= 2 * left) {
    launch(std::false_type{}, std::min(others, left), last);
  } else if (last.count() <= 4 * blocks) {
    launch(std::true_type{}, 0, last);
  } else {
    launch(std::true_type{}, 0, LastTokens{0, 1, 0});
    launch_append<RowT, T, kCsaRatio>(stream, params, last);
  }
}

template <class RowT, class T>
void launch_hca(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const LastTokens last = last_tokens<kHcaRatio>(params);
  const int rows = closing_capacity(plan.tokens, plan.requests, kHcaRatio);
  const auto launch = [&](auto threads, int appending) {
    constexpr int kThreads = decltype(threads)::value;
    prefill_hca_kernel<RowT, T, kThreads><<<kHalves*(rows + appending), kThreads, 0, stream>>>(params, rows, last);
  };
  // Large blocks, one to a multiprocessor, where all find place at once and no warp stores more than two tokens.
  const int left = static_cast<int>(multiprocessors()) / kHalves - rows;
  const int appending = blocks_for(last.count(), kHalves * kHcaThreads / kWarp);
  if (appending <= 2 * left) {
    launch(std::integral_constant<int, kHcaThreads>{}, std::min(appending, left));
  } else {
    launch(std::integral_constant<int, kHcaThreads / 2>{}, 2 * appending);
  }
}

template <class RowT, class T>
void launch_running(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const LastTokens last = last_tokens<0>(params);
  const int rows = closing_capacity(plan.tokens, plan.requests, kHcaRatio);
  const unsigned blocks = rows + plan.requests + blocks_for(last.count(), RunningThreads::kWarps);
  prefill_running_kernel<RowT, T><<<blocks, RunningThreads::kThreads, 0, stream>>>(params, rows, last);
}

}  // namespace

template <class RowT, class T>
void launch_prefill(CUstream_st* stream, const UpdateParams& params) {
  const Tail& tail = params.entries.compressor.tail;
  if (tail.data == nullptr) {
    launch_append<RowT, T, 0>(stream, params, last_tokens<0>(params));
  } else if (tail.geometry.overlaps()) {
    launch_csa<RowT, T>(stream, params);
  } else if (tail.running) {
    launch_running<RowT, T>(stream, params);
  } else {
    launch_hca<RowT, T>(stream, params);
  }
}

template void launch_prefill<float, float>(CUstream_st*, const UpdateParams&);
template void launch_prefill<float, bfloat16>(CUstream_st*, const UpdateParams&);
template void launch_prefill<bfloat16, float>(CUstream_st*, const UpdateParams&);
template void launch_prefill<bfloat16, bfloat16>(CUstream_st*, const UpdateParams&);

}  // namespace dsv4::cuda
