// Decode's kernels for window rows in bf16 and projections in bf16.

#include "cuda/update/decode_kernels.cuh"

template cudaError_t dsv4::cuda::launch_decode<dsv4::bfloat16, dsv4::bfloat16>(CUstream_st*, const UpdateParams&);
