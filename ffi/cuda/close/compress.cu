// compress and normalize on the GPU.

#include "cuda/close/hca.cuh"
#include "cuda/close/running.cuh"
#include "cuda/close/window.cuh"
#include "cuda/core/launch.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

constexpr int kHcaRanks = 4;

__device__ __forceinline__ Token closing_token(const CompressParams& params, int row, int* index) {
  *index = params.plan.closing(params.compressor.tail.geometry.ratio)[row];
  return token_at(params.plan, *index, params.compressor.tail.slots);
}

// CSA: one block an entry.
template <int W, class T>
__global__ void __launch_bounds__(W / 4) compress_csa_kernel(CompressParams params) {
  __shared__ float scratch[2 * RowThreads<W>::kWarps];
  const RowThreads<W> threads{static_cast<int>(threadIdx.x), 1, scratch};
  const Compressor compressor = with_constants<W, kCsaRatio>(params.compressor);
  const int64_t layer = *params.layer;
  int index;
  const Token closing = closing_token(params, blockIdx.x, &index);
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (closing.valid && layer >= 0 && layer < compressor.tail.layers) {
    csa_entry<W, T>(compressor, layer, closing, index, blockIdx.x, threads, x);
  }
  store_values(params.entries + static_cast<int64_t>(blockIdx.x) * W + threads.channel(), x);
}

// HCA: a cluster of blocks an entry.
template <class T>
__global__ void __cluster_dims__(kHcaRanks, 1, 1) __launch_bounds__(kHcaThreads)
    compress_hca_kernel(CompressParams params) {
  const HcaThread<kHcaRanks, kHcaThreads> at;
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.compressor);
  const int row = blockIdx.x / kHcaRanks;
  float* entry = params.entries + static_cast<int64_t>(row) * kHeadDim;
  const int64_t layer = *params.layer;
  int index;
  const Token closing = closing_token(params, row, &index);
  if (!closing.valid || layer < 0 || layer >= compressor.tail.layers) {
    if (at.finishes()) store_values(entry + at.channel(), {0.0f, 0.0f, 0.0f, 0.0f});
    return;
  }
  at.begin();
  finish_hca_entry(
      compressor, row, at, pool_hca_rows<T>(compressor, layer, closing, index, at),
      [&](const float (&x)[4], const RowThreads<kHeadDim>& threads) { store_values(entry + threads.channel(), x); });
}

// HCA from a running tail: one block an entry.
template <class T>
__global__ void __launch_bounds__(RunningThreads::kThreads) compress_running_kernel(CompressParams params) {
  __shared__ float scratch[2 * RunningThreads::kWarps];
  const RunningThreads threads{static_cast<int>(threadIdx.x), 1, scratch};
  const int64_t layer = *params.layer;
  int index;
  const Token closing = closing_token(params, blockIdx.x, &index);
  float x[2] = {0.0f, 0.0f};
  if (closing.valid && layer >= 0 && layer < params.compressor.tail.layers) {
    running_entry<T, kRowsInFlight>(with_constants<kHeadDim, kHcaRatio>(params.compressor), layer, closing, index,
                                    blockIdx.x, threads, x);
  }
  store_values(params.entries + static_cast<int64_t>(blockIdx.x) * kHeadDim + threads.channel(), x);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) normalize_kernel(NormalizeParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const RowThreads<kHeadDim> threads{static_cast<int>(threadIdx.x), 1, scratch};
  const int64_t row = blockIdx.x, angles = row * (kRopeDim / 2);
  const int channel = threads.channel();
  float x[4];
  load_values(static_cast<const T*>(params.rows) + row * kHeadDim + channel, x);
  const Finish finish =
      Finish::load<kHeadDim>(params.norm.weight, params.norm.cos + angles, params.norm.sin + angles, channel);
  finish.apply<kHeadDim>(x, threads.sum(square_sum(x)), params.norm.eps, channel);
  store_values(params.out + row * kHeadDim + channel, x);
}

}  // namespace

const char* compress(CUstream_st* stream, const CompressParams& params) {
  if (params.closing == 0) return nullptr;
  const Tail& tail = params.compressor.tail;
  const unsigned closing = static_cast<unsigned>(params.closing);
  if (!tail.geometry.overlaps() && tail.width != kHeadDim) return "compress: an HCA tail has width 512";
  with_element(params.compressor.projections.element, [&](auto element) {
    using T = decltype(element);
    if (tail.running) {
      compress_running_kernel<T><<<closing, RunningThreads::kThreads, 0, stream>>>(params);
    } else if (!tail.geometry.overlaps()) {
      compress_hca_kernel<T><<<closing * kHcaRanks, kHcaThreads, 0, stream>>>(params);
    } else if (tail.width == kHeadDim) {
      compress_csa_kernel<kHeadDim, T><<<closing, kHeadDim / 4, 0, stream>>>(params);
    } else {
      compress_csa_kernel<kKeyDim, T><<<closing, kKeyDim / 4, 0, stream>>>(params);
    }
  });
  return launch_error();
}

const char* normalize(CUstream_st* stream, const NormalizeParams& params) {
  if (params.count == 0) return nullptr;
  with_element(params.element, [&](auto element) {
    normalize_kernel<decltype(element)><<<static_cast<unsigned>(params.count), kRowThreads, 0, stream>>>(params);
  });
  return launch_error();
}

}  // namespace dsv4::cuda
