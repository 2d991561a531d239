// Window rows set aside on the GPU: save_displaced.
//
// Threads: a warp to each row, which all of its lanes look up; then they copy it, 4 bytes a lane at a time, which the
// scales of every format are aligned to. No barriers, no shared memory.

#include "cuda/core/launch.cuh"
#include "layout/displaced.h"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

constexpr int kWarps = 8, kLanes = 32;

__device__ void copy_words(uint8_t* to, const uint8_t* from, int bytes) {
  for (int word = threadIdx.x % kLanes; word < bytes / 4; word += kLanes) {
    reinterpret_cast<uint32_t*>(to)[word] = reinterpret_cast<const uint32_t*>(from)[word];
  }
}

__global__ void __launch_bounds__(kWarps* kLanes) save_displaced_kernel(SaveDisplacedParams params) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes, rows = params.displaced.rows;
  if (row >= rows) return;
  const DisplacedSource from = displaced_source(params, static_cast<int>(row));
  const bool found = from.page != nullptr;
  if (threadIdx.x % kLanes == 0) params.displaced_positions[row] = found ? from.position : -1;
  if (!found) return;
  const int64_t data = params.data_bytes, scales = params.scale_bytes;
  copy_words(params.displaced.data + row * data, from.page + from.row * data, params.data_bytes);
  copy_words(params.displaced.data + rows * data + row * scales, from.page + from.rows * data + from.row * scales,
             params.scale_bytes);
}

}  // namespace

const char* save_displaced(CUstream_st* stream, const SaveDisplacedParams& params) {
  if (params.displaced.rows == 0) return nullptr;
  save_displaced_kernel<<<blocks_for(params.displaced.rows, kWarps), kWarps * kLanes, 0, stream>>>(params);
  return launch_error("save_displaced");
}

}  // namespace dsv4::cuda
