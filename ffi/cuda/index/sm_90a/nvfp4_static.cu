// The indexer's scores on Hopper over nvfp4_static keys.

#include "cuda/index/hopper.h"
#include "cuda/index/score.cuh"

namespace dsv4::cuda::index {

cudaError_t score_nvfp4_static(cudaStream_t stream, const IndexTopkParams& params, int first, int end) {
  return launch_score<Nvfp4Keys<false>>(stream, params, first, end);
}

}  // namespace dsv4::cuda::index
