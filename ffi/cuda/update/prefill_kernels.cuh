// Prefill: the writes of one layer in a step whose closing entries are a list.
//
// One launch closes windows and stores the rows that survive; with CSA, where these are many, they are a launch of
// their own.

#pragma once

#include "cuda/core/launch.cuh"
#include "cuda/update/prefill_csa.cuh"
#include "cuda/update/prefill_hca.cuh"
#include "cuda/update/prefill_running.cuh"

namespace dsv4::cuda {
namespace {

constexpr int kAppendWarps = 8;

// Nothing closes, or more rows survive than the closing kernels' blocks can store in passing.
template <class RowT, class T, int kRatio, bool kDeep>
__global__ void __launch_bounds__(kAppendWarps* kWarp, 2)
    append_last_tokens_kernel(UpdateParams params, LastTokens last) {
  append_last_tokens<RowT, T, kRatio, kDeep>(params, last, blockIdx.x * kAppendWarps + threadIdx.x / kWarp,
                                             gridDim.x * kAppendWarps, threadIdx.x % kWarp);
}

// As many blocks as find place at once, `at_once`, or a multiple of it where runs would get too long.
int run_blocks(int rows, int64_t at_once) {
  return static_cast<int>(std::min<int64_t>(rows, at_once * blocks_for(rows, at_once * Runs::kEven)));
}

template <class RowT, class T, int kRatio, bool kDeep>
cudaError_t launch_append(CUstream_st* stream, const UpdateParams& params, const LastTokens& last) {
  append_last_tokens_kernel<RowT, T, kRatio, kDeep>
      <<<blocks_for(last.count(), kAppendWarps), kAppendWarps * kWarp, 0, stream>>>(params, last);
  return cudaGetLastError();
}

template <class RowT, class T, bool kDeep>
cudaError_t launch_csa(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const LastTokens last = last_tokens<kCsaRatio>(params);
  const int rows = closing_capacity(plan.tokens, plan.requests, kCsaRatio);
  const int at_once = static_cast<int>(multiprocessors()) * kRunBlocks<RowT, T>, blocks = run_blocks(rows, at_once);
  const auto launch = [&](auto in_passing, int others, const LastTokens& tokens) {
    const auto kernel = prefill_csa_kernel<RowT, T, decltype(in_passing)::value, kDeep>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRunBytes<T>);
    if (status != cudaSuccess) return status;
    kernel<<<blocks + others, kRunThreads, kRunBytes<T>, stream>>>(params, Runs(rows, blocks), tokens);
    return cudaGetLastError();
  };
  // More blocks for the rows that survive where these find place too and no warp stores more than two tokens; else at
  // most four tokens in passing; else they are a launch of their own.
  const int left = at_once - blocks, others = blocks_for(last.count(), kRunWarps);
  if (others <= 2 * left) return launch(std::false_type{}, std::min(others, left), last);
  if (last.count() <= 4 * blocks) return launch(std::true_type{}, 0, last);
  const cudaError_t status = launch(std::true_type{}, 0, LastTokens{0, 1, 0});
  return status == cudaSuccess ? launch_append<RowT, T, kCsaRatio, kDeep>(stream, params, last) : status;
}

template <class RowT, class T, bool kDeep>
cudaError_t launch_hca(CUstream_st* stream, const UpdateParams& params) {
  constexpr int kHalves = 2;
  const Plan& plan = params.window.plan;
  const LastTokens last = last_tokens<kHcaRatio>(params);
  const int rows = closing_capacity(plan.tokens, plan.requests, kHcaRatio);
  const auto launch = [&](auto ranks, auto threads, int appending) {
    constexpr int kRanks = decltype(ranks)::value, kThreads = decltype(threads)::value;
    prefill_hca_kernel<RowT, T, kRanks, kThreads, kDeep>
        <<<kRanks*(rows + appending), kThreads, 0, stream>>>(params, rows, last);
    return cudaGetLastError();
  };
  const auto one = std::integral_constant<int, 1>{};
  const auto halves = std::integral_constant<int, kHalves>{};
  const auto all = std::integral_constant<int, kHcaThreads>{};
  const auto half_of_all = std::integral_constant<int, kHcaThreads / 2>{};
  if (!has_clusters(prefill_hca_kernel<RowT, T, kHalves, kHcaThreads, kDeep>)) {
    return launch(one, all, blocks_for(last.count(), kHcaThreads / kWarp));
  }
  // Large blocks, one to a multiprocessor, where all find place at once and no warp stores more than two tokens.
  const int left = static_cast<int>(multiprocessors()) / kHalves - rows;
  const int appending = blocks_for(last.count(), kHalves * kHcaThreads / kWarp);
  return appending <= 2 * left ? launch(halves, all, std::min(appending, left))
                               : launch(halves, half_of_all, 2 * appending);
}

template <class RowT, class T>
cudaError_t launch_running(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const LastTokens last = last_tokens<0>(params);
  const int rows = closing_capacity(plan.tokens, plan.requests, kHcaRatio);
  const unsigned blocks = rows + plan.requests + blocks_for(last.count(), RunningThreads::kWarps);
  prefill_running_kernel<RowT, T><<<blocks, RunningThreads::kThreads, 0, stream>>>(params, rows, last);
  return cudaGetLastError();
}

}  // namespace

template <class RowT, class T>
cudaError_t launch_prefill(CUstream_st* stream, const UpdateParams& params) {
  const Tail& tail = params.entries.compressor.tail;
  if (tail.data == nullptr) return launch_append<RowT, T, 0, false>(stream, params, last_tokens<0>(params));
  if (tail.running) return launch_running<RowT, T>(stream, params);
  const bool deep = tail.geometry.depth > 0;
  if (tail.geometry.overlaps()) {
    return deep ? launch_csa<RowT, T, true>(stream, params) : launch_csa<RowT, T, false>(stream, params);
  }
  return deep ? launch_hca<RowT, T, true>(stream, params) : launch_hca<RowT, T, false>(stream, params);
}

}  // namespace dsv4::cuda
