// Attention on Hopper over windows of `fp8` rows.

#include "cuda/attend/hopper.h"
#include "cuda/attend/hopper_launch.cuh"

namespace dsv4::cuda::attention {

const char* attend_fp8_window(CUstream_st* stream, const AttendParams& params) {
  return launch_for_entries<Fp8<kHeadDim>>(stream, params);
}

}  // namespace dsv4::cuda::attention
