// Launching attention on Hopper.
#pragma once

#include "cuda/attend/hopper.cuh"
#include "cuda/attend/parts.cuh"
#include "cuda/core/launch.cuh"

namespace dsv4::cuda::attention {

template <class WindowCodec, class EntryCodec>
cudaError_t launch_hopper(cudaStream_t stream, const AttendParams& params) {
  const auto kernel = attend_kernel<WindowCodec, EntryCodec>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes);
  if (status == cudaSuccess && params.blocks > 8) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(params.blocks * params.parts, params.plan.tokens, blocks_for(params.heads, params.block_heads));
  config.blockDim = kThreads;
  config.dynamicSmemBytes = Shared::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(params.blocks), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  status = cudaLaunchKernelEx(&config, kernel, params);
  if (status != cudaSuccess || params.parts == 1) return status;
  const dim3 grid(blocks_for(params.heads, kMergeWarps), params.plan.tokens);
  merge_parts_kernel<<<grid, kMergeWarps * kWarp, 0, stream>>>(params);
  return cudaGetLastError();
}

// Launches for the format of the entries, which is any but fp32; without entries, as if they were stored like the
// window.
template <class WindowCodec>
const char* launch_for_entries(CUstream_st* stream, const AttendParams& params) {
  cudaError_t status = cudaErrorNotSupported;
  visit_codec(HeadCodecs{}, (params.entries.data == nullptr ? params.window : params.entries).codec, [&](auto codec) {
    using EntryCodec = decltype(codec);
    if constexpr (!std::is_same_v<EntryCodec, Fp32<kHeadDim>>) {
      status = launch_hopper<WindowCodec, EntryCodec>(stream, params);
    }
  });
  return launch_error("attend", status);
}

}  // namespace dsv4::cuda::attention
