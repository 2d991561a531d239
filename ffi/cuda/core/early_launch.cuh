// Kernels that begin before the one ahead of them in the stream has ended: their blocks take up free room, read what
// older kernels left, and wait where they want what that one writes. In a graph the edge between the two is a
// programmatic one.
//
// The rule: such a kernel waits in every block, whatever else the block does, so that it never ends before the other
// has. What comes after it in the stream is launched as ever, and finds both ended.
#pragma once

#include <cuda_runtime.h>

namespace dsv4::cuda {

// Waits until the kernel ahead has ended and what it wrote is known here; no wait where the launch was a plain one.
__device__ __forceinline__ void await_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel, if it is launched early, begin once all blocks have come here or ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel that waits, compiled for 9.0 or later (`has_clusters` in launch.cuh), early if `early`.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 threads, int shared,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return cudaGetLastError();
}

}  // namespace dsv4::cuda
