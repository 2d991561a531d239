// Attention on Hopper as the launcher of all ways sees it: one function for each format of window rows, compiled for
// sm_90a.
#pragma once

#include "ops/params.h"

struct CUstream_st;  // cudaStream_t

namespace dsv4::cuda::attention {

// Each launches for any format of entries but fp32, and returns null or the CUDA error that the launch met.
const char* attend_bf16_window(CUstream_st* stream, const AttendParams& params);
const char* attend_fp8_window(CUstream_st* stream, const AttendParams& params);
const char* attend_fp8_ds_mla_window(CUstream_st* stream, const AttendParams& params);

}  // namespace dsv4::cuda::attention
