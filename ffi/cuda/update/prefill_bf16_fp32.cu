// Prefill's kernels for window rows in bf16 and projections in fp32.

#include "cuda/update/prefill_kernels.cuh"

template cudaError_t dsv4::cuda::launch_prefill<dsv4::bfloat16, float>(CUstream_st*, const UpdateParams&);
