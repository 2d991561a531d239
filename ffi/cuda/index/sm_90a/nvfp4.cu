// The indexer's scores on Hopper over nvfp4 keys.

#include "cuda/index/hopper.h"
#include "cuda/index/score.cuh"

namespace dsv4::cuda::index {

cudaError_t score_nvfp4(cudaStream_t stream, const IndexTopkParams& params, int first, int end) {
  return launch_score<Nvfp4Keys<true>>(stream, params, first, end);
}

}  // namespace dsv4::cuda::index
