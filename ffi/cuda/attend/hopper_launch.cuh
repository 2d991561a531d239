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
  config.gridDim = dim3(params.blocks * params.parts, params.plan.tokens, blocks_for(params.heads, kTileHeads));
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

// Formats of entries that have a decoder.
using HopperCodecs =
    CodecList<Bf16<kHeadDim>, Fp8<kHeadDim>, Fp8DsMla<kHeadDim>, Nvfp4<kHeadDim>, Nvfp4Static<kHeadDim>>;

template <class WindowCodec, class... EntryCodecs>
const char* launch_for_entries(CUstream_st* stream, const AttendParams& params, CodecList<EntryCodecs...>) {
  cudaError_t status = cudaErrorNotSupported;
  const auto launch = [&](auto entry) { status = launch_hopper<WindowCodec, decltype(entry)>(stream, params); };
  // Without entries: as if they were stored like the window.
  const int codec = params.entries.data == nullptr ? params.window.codec : params.entries.codec;
  const char* name = nullptr;
  visit_codec(HeadCodecs{}, codec, [&](auto known) { name = decltype(known)::kName; });
  static_cast<void>(((strcmp(EntryCodecs::kName, name) == 0 ? (launch(EntryCodecs{}), true) : false) || ...));
  return launch_error("attend", status);
}

template <class WindowCodec>
const char* launch_for_entries(CUstream_st* stream, const AttendParams& params) {
  return launch_for_entries<WindowCodec>(stream, params, HopperCodecs{});
}

}  // namespace dsv4::cuda::attention
