// Prefill's kernels for window rows in fp32 and projections in fp32.

#include "cuda/update/prefill_kernels.cuh"

template cudaError_t dsv4::cuda::launch_prefill<float, float>(CUstream_st*, const UpdateParams&);
