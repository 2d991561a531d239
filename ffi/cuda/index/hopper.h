// The indexer's scores on Hopper as the launcher sees them: one function for each format of keys, compiled for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include "ops/params.h"

namespace dsv4::cuda::index {

// Each scores tokens first .. end - 1 of the step, for up to kHopperHeads heads and pages of 32 keys.
constexpr int kHopperHeads = 64;
cudaError_t score_fp8(cudaStream_t stream, const IndexTopkParams& params, int first, int end);
cudaError_t score_mxfp4(cudaStream_t stream, const IndexTopkParams& params, int first, int end);
cudaError_t score_nvfp4(cudaStream_t stream, const IndexTopkParams& params, int first, int end);
cudaError_t score_nvfp4_static(cudaStream_t stream, const IndexTopkParams& params, int first, int end);
cudaError_t score_bf16(cudaStream_t stream, const IndexTopkParams& params, int first, int end);

}  // namespace dsv4::cuda::index
