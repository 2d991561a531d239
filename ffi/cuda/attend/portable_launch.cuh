// Launching attention's portable kernels.
#pragma once

#include "cuda/attend/exact.cuh"
#include "cuda/attend/tensor.cuh"

namespace dsv4::cuda::attention {

template <class Products>
__global__ void __launch_bounds__(kPortableThreads) portable_kernel(const __grid_constant__ AttendParams params) {
  attend_portably<Products>(params);
}

template <class Products>
cudaError_t launch_portable(cudaStream_t stream, const AttendParams& params) {
  constexpr int kBytes = sizeof(typename Products::Shared);
  const auto kernel = portable_kernel<Products>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(params.plan.tokens, (params.heads + kPortableHeads - 1) / kPortableHeads);
  kernel<<<grid, kPortableThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace dsv4::cuda::attention
