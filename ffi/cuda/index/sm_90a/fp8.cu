// The indexer's scores on Hopper over fp8 keys.

#include "cuda/index/hopper.h"
#include "cuda/index/score.cuh"

namespace dsv4::cuda::index {

cudaError_t score_fp8(cudaStream_t stream, const IndexTopkParams& params, int first, int end) {
  return launch_score<Fp8Keys>(stream, params, first, end);
}

}  // namespace dsv4::cuda::index
