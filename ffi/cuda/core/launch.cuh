// Launching: grids that follow from static shapes, a kernel's template arguments from run-time choices, errors as text.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

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

inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Calls `visit(codec, alignment)`, 16 wherever these pages allow it.
template <class Visitor>
void with_codec(const Pool& pool, Visitor&& visit) {
  visit_codec(pool.width, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (!Layout<Codec>::kAligned16) {
      if (Layout<Codec>::page_bytes(pool.rows) % 16 != 0) {
        visit(codec, std::integral_constant<int, 4>{});
        return;
      }
    }
    visit(codec, std::integral_constant<int, 16>{});
  });
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
