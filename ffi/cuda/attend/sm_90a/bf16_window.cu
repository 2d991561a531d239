// Attention on Hopper over windows of `bf16` rows.

#include "cuda/attend/hopper.h"
#include "cuda/attend/hopper_launch.cuh"

namespace dsv4::cuda::attention {

const char* attend_bf16_window(CUstream_st* stream, const AttendParams& params) {
  return launch_for_entries<Bf16<kHeadDim>>(stream, params);
}

}  // namespace dsv4::cuda::attention
