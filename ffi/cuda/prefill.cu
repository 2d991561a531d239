// Prefill: the writes of one layer in a step with more tokens than requests.
//
// One launch closes windows, and its blocks' last warps store the rows that survive, unless these are many: then they
// are a launch of their own.

#include "prefill_csa.cuh"
#include "prefill_hca.cuh"
#include "prefill_running.cuh"

namespace dsv4::cuda {
namespace {

constexpr int kAppendWarps = 8;

// Nothing closes, or more rows survive than the closing kernels' blocks can store in passing.
template <class RowT, class T, int kRatio>
__global__ void __launch_bounds__(kAppendWarps* kWarp) append_last_tokens_kernel(UpdateParams params, LastTokens last) {
  append_last_tokens<RowT, T, kRatio>(params, last, blockIdx.x * kAppendWarps + threadIdx.x / kWarp,
                                      gridDim.x * kAppendWarps, threadIdx.x % kWarp);
}

// As many blocks as the multiprocessors hold, or a multiple of it: runs differ by one window at most.
unsigned run_blocks(int rows, int at_once) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t slots = int64_t{multiprocessors} * at_once;
  return static_cast<unsigned>(std::min<int64_t>(rows, slots * blocks_for(rows, slots * kLongestRun)));
}

constexpr int kInPassing = 4;  // tokens that a closing block stores at most

template <class RowT, class T, int kRatio>
void launch(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const int rows = kRatio == 0 ? 0 : closing_capacity(plan.tokens, plan.requests, kRatio);
  unsigned blocks = static_cast<unsigned>(rows * kHalves);
  if constexpr (kRatio == kCsaRatio) blocks = run_blocks(rows, kRunBlocks<T>);

  const int kept = kRatio == 0 ? 0 : params.entries.compressor.tail.geometry.rows();
  const LastTokens last{plan.requests, std::min(plan.tokens, std::max(params.window.window.rows, kept))};
  const int64_t tokens = static_cast<int64_t>(last.requests) * last.per_request;
  const bool in_passing = tokens <= static_cast<int64_t>(blocks) * kInPassing;
  if (blocks > 0) {
    const LastTokens passed = in_passing ? last : LastTokens{0, 0};
    const auto close = [&](auto kernel, int threads, int shared_bytes) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      kernel<<<blocks, threads, shared_bytes, stream>>>(params, rows, passed);
    };
    if constexpr (kRatio == kCsaRatio) close(prefill_csa_kernel<RowT, T>, kRunThreads, kRunBytes<T>);
    if constexpr (kRatio == kHcaRatio) close(prefill_hca_kernel<RowT, T>, kHalfThreads, kHalfBytes<T>);
  }
  if (!in_passing) {
    append_last_tokens_kernel<RowT, T, kRatio>
        <<<blocks_for(tokens, kAppendWarps), kAppendWarps * kWarp, 0, stream>>>(params, last);
  }
}

template <class T>
void launch_running(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const int rows = closing_capacity(plan.tokens, plan.requests, kHcaRatio);
  prefill_running_kernel<T><<<rows + plan.requests, kRowThreads, 0, stream>>>(params, rows);
}

}  // namespace

template <class RowT, class T>
void launch_prefill(CUstream_st* stream, const UpdateParams& params) {
  const Tail& tail = params.entries.compressor.tail;
  if (tail.data == nullptr) {
    launch<RowT, T, 0>(stream, params);
  } else if (tail.geometry.overlaps()) {
    launch<RowT, T, kCsaRatio>(stream, params);
  } else if (tail.running) {
    launch_running<T>(stream, params);
    launch<RowT, T, 0>(stream, params);  // the window
  } else {
    launch<RowT, T, kHcaRatio>(stream, params);
  }
}

template void launch_prefill<float, float>(CUstream_st*, const UpdateParams&);
template void launch_prefill<float, bfloat16>(CUstream_st*, const UpdateParams&);
template void launch_prefill<bfloat16, float>(CUstream_st*, const UpdateParams&);
template void launch_prefill<bfloat16, bfloat16>(CUstream_st*, const UpdateParams&);

}  // namespace dsv4::cuda
