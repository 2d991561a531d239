// Attention on Hopper over windows of `fp8_ds_mla` rows.

#include "cuda/attend/hopper.h"
#include "cuda/attend/hopper_launch.cuh"

namespace dsv4::cuda::attention {

const char* attend_fp8_ds_mla_window(CUstream_st* stream, const AttendParams& params) {
  return launch_for_entries<Fp8DsMla<kHeadDim>>(stream, params);
}

}  // namespace dsv4::cuda::attention
