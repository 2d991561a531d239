// compress and normalize on the GPU.

#include "../common/kernels.h"
#include "cluster.cuh"
#include "launch.cuh"
#include "window.cuh"

namespace dsv4::cuda {
namespace {

__device__ __forceinline__ Token closing_token(const CompressParams& params, int row, int* index) {
  *index = params.plan.closing(params.compressor.tail.geometry.ratio)[row];
  return token_at(params.plan, *index, params.compressor.tail.slots);
}

// Finishes entry `row` and writes it, or zeros.
template <int W>
__device__ __forceinline__ void write_entry(const CompressParams& params, int row, bool valid, const Partial4& partial,
                                            const RowThreads<W>& threads) {
  const Compressor& compressor = params.compressor;
  const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (valid) {
    finish(x, partial, threads, compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, compressor.eps,
           compressor.hadamard);
  }
  store_four(params.entries + static_cast<int64_t>(row) * W + threads.channel(), x);
}

// CSA: one block an entry.
template <int W, class T>
__global__ void __launch_bounds__(W / 4) compress_csa_kernel(CompressParams params) {
  __shared__ float scratch[2 * RowThreads<W>::kWarps];
  const RowThreads<W> threads{static_cast<int>(threadIdx.x), 1, scratch};
  const Compressor& compressor = params.compressor;
  const int64_t layer = *params.layer;
  int index;
  const Token closing = closing_token(params, blockIdx.x, &index);
  const bool valid = closing.valid && layer >= 0 && layer < compressor.tail.layers;
  Partial4 partial;
  if (valid) {
    partial = pool_rows<T>(compressor.tail, compressor.projections, layer, closing, index, 0, threads.channel());
  }
  write_entry(params, blockIdx.x, valid, partial, threads);
}

// HCA: one cluster an entry.
template <class T>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kClusterThreads)
    compress_hca_kernel(CompressParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const RowThreads<kHeadDim> threads{static_cast<int>(threadIdx.x) % kRowThreads, 1, scratch};
  const int row = blockIdx.x / kClusterBlocks;
  const bool first = blockIdx.x % kClusterBlocks == 0 && threadIdx.x < kRowThreads;
  const int64_t layer = *params.layer;
  int index;
  const Token closing = closing_token(params, row, &index);
  const bool valid = closing.valid && layer >= 0 && layer < params.compressor.tail.layers;
  Partial4 partial;
  if (valid) partial = pool_with_cluster<T>(params.compressor, layer, closing, index);
  if (first) write_entry(params, row, valid, partial, threads);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) normalize_kernel(NormalizeParams params) {
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const RowThreads<kHeadDim> threads{static_cast<int>(threadIdx.x), 1, scratch};
  const int64_t row = blockIdx.x, angles = row * (kRopeDim / 2);
  float x[4];
  load_four(static_cast<const T*>(params.rows) + row * kHeadDim + threads.channel(), x);
  normalize(x, threads, params.norm.weight, params.norm.cos + angles, params.norm.sin + angles, params.norm.eps);
  store_four(params.out + row * kHeadDim + threads.channel(), x);
}

}  // namespace

const char* compress(CUstream_st* stream, const CompressParams& params) {
  if (params.closing == 0) return nullptr;
  const Tail& tail = params.compressor.tail;
  const unsigned closing = static_cast<unsigned>(params.closing);
  if (!tail.geometry.overlaps() && tail.width != kHeadDim) return "compress: an HCA tail has width 512";
  with_element(params.compressor.projections.element, [&](auto element) {
    using T = decltype(element);
    if (!tail.geometry.overlaps()) {
      compress_hca_kernel<T><<<closing * kClusterBlocks, kClusterThreads, 0, stream>>>(params);
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
