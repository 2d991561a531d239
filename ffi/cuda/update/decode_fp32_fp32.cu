// Decode's kernels for window rows in fp32 and projections in fp32.

#include "cuda/update/decode_kernels.cuh"

template cudaError_t dsv4::cuda::launch_decode<float, float>(CUstream_st*, const UpdateParams&);
