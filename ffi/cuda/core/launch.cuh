// Launching: grids that follow from static shapes, a kernel's template arguments from run-time choices, errors as text.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "layout/codecs.h"
#include "ops/params.h"

namespace dsv4::cuda {

constexpr int kRowWarps = 4;  // rows (one a warp) of a block

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

inline unsigned multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return static_cast<unsigned>(count);
}

// Whether this device runs machine code of sm_90a, which none but compute capability 9.0 does.
inline bool is_hopper() {
  int device = 0, major = 0, minor = -1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

// What an op's launch met, by name; null if nothing. The text lives until the thread's next error.
inline const char* launch_error(const char* op, cudaError_t status = cudaGetLastError()) {
  if (status == cudaSuccess) return nullptr;
  // Nothing of the C++ library: a release takes another one than that of nvcc's host compiler.
  thread_local char text[256];
  std::snprintf(text, sizeof(text), "dsv4 %s: the kernel cannot be launched: %s", op, cudaGetErrorString(status));
  return text;
}

// Whether the code of `kernel` that this device runs was compiled for clusters of blocks. The code is asked, not the
// device: PTX of an older architecture knows none on a newer device either.
template <class Kernel>
bool has_clusters(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Calls `visit(T{})` with the element type.
template <class Visitor>
void with_element(Element element, Visitor&& visit) {
  if (element == Element::kFloat32) {
    visit(float{});
  } else {
    visit(bfloat16{});
  }
}

}  // namespace dsv4::cuda
