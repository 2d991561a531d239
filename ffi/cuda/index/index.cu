// index_topk on the GPU: scores of a slab of tokens at a time, then the best of each; by what the device has.

#include "cuda/core/early_launch.cuh"
#include "cuda/core/launch.cuh"
#include "cuda/index/hopper.h"
#include "cuda/index/portable.cuh"
#include "cuda/index/select.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace index {
namespace {

template <class Codec>
cudaError_t score_portable(cudaStream_t stream, const IndexTopkParams& params, int first, int end) {
  const int tokens = end - first;
  const unsigned most = blocks_for(params.capacity, kPortableThreads);
  const dim3 grid(std::clamp(blocks_for(4 * multiprocessors(), tokens), 1u, most), tokens);
  portable_score_kernel<Codec><<<grid, kPortableThreads, 0, stream>>>(params, first);
  return cudaGetLastError();
}

template <class Codec>
cudaError_t score(cudaStream_t stream, const IndexTopkParams& params, bool hopper, int first, int end) {
  if constexpr (!std::is_same_v<Codec, Fp32<kKeyDim>>) {
    if (hopper && params.heads <= kHopperHeads) {
      if constexpr (std::is_same_v<Codec, Fp8Pow2<kKeyDim>>) return score_fp8(stream, params, first, end);
      if constexpr (std::is_same_v<Codec, Mxfp4<kKeyDim>>) return score_mxfp4(stream, params, first, end);
      if constexpr (std::is_same_v<Codec, Nvfp4<kKeyDim>>) return score_nvfp4(stream, params, first, end);
      if constexpr (std::is_same_v<Codec, Nvfp4Static<kKeyDim>>) return score_nvfp4_static(stream, params, first, end);
      if constexpr (std::is_same_v<Codec, Bf16<kKeyDim>>) return score_bf16(stream, params, first, end);
    }
  }
  return score_portable<Codec>(stream, params, first, end);
}

// Bytes of shared memory that a block can have.
int shared_memory_room() {
  int device = 0, room = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return room;
}

// Early behind scores: what a token sees, which it reads before it waits, is older than they are.
template <int kThreads, int kCluster, class Mask = uint32_t>
cudaError_t launch_select(cudaStream_t stream, const IndexTopkParams& params, bool scored, int first, int tokens) {
  const auto kernel = select_kernel<kThreads, kCluster, Mask>;
  const int shared = select_bytes(params.capacity, kCluster);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  return launch_early(scored && has_clusters(kernel), kernel, tokens * kCluster, kThreads, shared, stream, params,
                      first);
}

cudaError_t select(cudaStream_t stream, const IndexTopkParams& params, bool scored, int first, int end) {
  const int tokens = end - first, places = static_cast<int>(multiprocessors()), room = shared_memory_room();
  const int64_t most = params.capacity;
  const auto fits = [&](int cluster) { return most <= 32768 * cluster && select_bytes(most, cluster) <= room; };
  // Two tokens a multiprocessor where there are so many.
  if (most <= 16384 && tokens > places) return launch_select<512, 1>(stream, params, scored, first, tokens);
  if (most <= 20480 && tokens > places && fits(1)) {
    return launch_select<512, 1, uint64_t>(stream, params, scored, first, tokens);
  }
  if (fits(1)) return launch_select<1024, 1>(stream, params, scored, first, tokens);
  if (!has_clusters(select_kernel<1024, 8, uint32_t>) || !fits(8)) {
    portable_select_kernel<<<tokens, kDigitThreads, 0, stream>>>(params, first);
    return cudaGetLastError();
  }
  // More blocks for a token where there are few tokens.
  if (most <= 131072 && 8 * tokens <= places) return launch_select<512, 8>(stream, params, scored, first, tokens);
  if (fits(2)) return launch_select<1024, 2>(stream, params, scored, first, tokens);
  if (fits(4)) return launch_select<1024, 4>(stream, params, scored, first, tokens);
  return launch_select<1024, 8>(stream, params, scored, first, tokens);
}

}  // namespace
}  // namespace index

const char* index_topk(CUstream_st* stream, const IndexTopkParams& params) {
  const bool hopper = is_hopper();
  const bool scored = params.k < params.capacity || params.scores != nullptr;
  cudaError_t status = cudaSuccess;
  for (int first = 0; first < params.plan.tokens && status == cudaSuccess; first += static_cast<int>(params.slab)) {
    const int end = std::min(params.plan.tokens, first + static_cast<int>(params.slab));
    if (scored) {
      visit_codec(KeyCodecs{}, params.pool.codec,
                  [&](auto codec) { status = index::score<decltype(codec)>(stream, params, hopper, first, end); });
    }
    if (status == cudaSuccess) status = index::select(stream, params, scored, first, end);
  }
  return status == cudaSuccess ? nullptr : launch_error("index_topk", status);
}

}  // namespace dsv4::cuda
