// Pooling, normalizing and rotating closed windows on the GPU: one block an entry.
//
// threadIdx.x owns four channels. An HCA window's sixteen groups are spread over threadIdx.y; each thread merges its four
// neighbouring groups, shared memory merges the rest, so that the tree is the one of ffi/common/pooling.h.

#include "../common/kernels.h"
#include "../common/pooling.h"
#include "../common/window_rows.h"
#include "launch.cuh"
#include "warp_rows.cuh"

namespace dsv4::cuda {
namespace {

// Four channels of a partly pooled window.
struct Partial4 {
  SoftmaxPartial channel[4];
};

__device__ __forceinline__ Partial4 merge4(const Partial4& a, const Partial4& b) {
  Partial4 merged;
#pragma unroll
  for (int i = 0; i < 4; ++i) merged.channel[i] = merge(a.channel[i], b.channel[i]);
  return merged;
}

template <class T>
__device__ __forceinline__ Partial4 read_group(const CompressParams& params, int64_t layer, const Token& closing,
                                               int index, int group, int channel) {
  const Tail& tail = params.tail;
  const Projections& in = params.projections;
  float kv[4][kGroupRows], score[4][kGroupRows];
#pragma unroll
  for (int i = 0; i < kGroupRows; ++i) {
    const WindowRow from = window_row(tail, in.columns, closing, index, group * kGroupRows + i);
    float row_kv[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float row_score[4] = {kClearedScore, kClearedScore, kClearedScore, kClearedScore};
    if (from.source == WindowRow::kStep) {
      float ape[4];
      load_four(static_cast<const T*>(in.kv) + from.projection + channel, row_kv);
      load_four(static_cast<const T*>(in.gate) + from.projection + channel, row_score);
      load_four(in.ape + from.ape + channel, ape);
#pragma unroll
      for (int c = 0; c < 4; ++c) row_score[c] += ape[c];
    } else if (from.source == WindowRow::kTail) {
      load_four(tail_row(tail, layer, closing.slot, 0, from.tail_row) + channel, row_kv);
      load_four(tail_row(tail, layer, closing.slot, 1, from.tail_row) + channel, row_score);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) kv[c][i] = row_kv[c], score[c][i] = row_score[c];
  }
  Partial4 partial;
#pragma unroll
  for (int c = 0; c < 4; ++c) partial.channel[c] = pool_group(kv[c], score[c]);
  return partial;
}

// The balanced sum over the block's row of threads; every thread of threadIdx.y == 0 learns it.
template <int W>
__device__ __forceinline__ float sum_over_row(float leaf) {
  const float of_warp = sum_over_lanes(leaf);
  if constexpr (W == kQuadChannels) {
    return of_warp;
  } else {
    static_assert(W == 4 * kQuadChannels, "four warps a row");
    __shared__ float of_warps[4];
    if (threadIdx.y == 0 && threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    return (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3]);
  }
}

__device__ __forceinline__ void hadamard_transform(float (&x)[4]) {
  const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const bool high = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] = high ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= kHadamardScale;
}

// kGroups groups a window, pooled by kSplits rows of threads.
template <int W, int kGroups, int kSplits, class T>
__global__ void __launch_bounds__(W / 4 * kSplits) compress_kernel(CompressParams params) {
  constexpr int kEach = kGroups / kSplits;
  const Tail& tail = params.tail;
  const int64_t layer = *params.layer;
  const int channel = 4 * threadIdx.x;
  float* entry = params.entries + static_cast<int64_t>(blockIdx.x) * W + channel;
  const int index = params.plan.closing(tail.geometry.ratio)[blockIdx.x];
  const Token closing = token_at(params.plan, index, tail.slots);
  if (!closing.valid || layer < 0 || layer >= tail.layers) {
    if (threadIdx.y == 0) store_four(entry, {0.0f, 0.0f, 0.0f, 0.0f});
    return;
  }

  Partial4 partial;
  if constexpr (kEach == 1) {
    partial = read_group<T>(params, layer, closing, index, threadIdx.y, channel);
  } else {
    static_assert(kEach == 4, "one or four groups a thread");
    const int first = threadIdx.y * kEach;
    Partial4 halves[2];
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const Partial4 even = read_group<T>(params, layer, closing, index, first + 2 * half, channel);
      const Partial4 odd = read_group<T>(params, layer, closing, index, first + 2 * half + 1, channel);
      if (half == 0) {
        halves[0] = merge4(even, odd);
      } else {
        halves[1] = merge4(even, odd);
      }
    }
    partial = merge4(halves[0], halves[1]);
  }
  if constexpr (kSplits > 1) {
    static_assert(kSplits == 4, "merged as (0, 1), (2, 3)");
    __shared__ Partial4 partials[kSplits - 1][W / 4];
    if (threadIdx.y > 0) partials[threadIdx.y - 1][threadIdx.x] = partial;
    __syncthreads();
    if (threadIdx.y == 0) {
      partial = merge4(merge4(partial, partials[0][threadIdx.x]), merge4(partials[1][threadIdx.x], partials[2][threadIdx.x]));
    }
  }

  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = pooled(partial.channel[i]);
  const float inverse = inverse_rms(sum_over_row<W>(square_sum(x)), W, params.eps);
  if (threadIdx.y > 0) return;
  float weight[4];
  load_four(params.norm_weight + channel, weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = x[i] * inverse * weight[i];
  if (channel >= W - kRopeDim) {
    const int64_t angles = static_cast<int64_t>(blockIdx.x) * (kRopeDim / 2);
    rotate_pairs(x, params.cos + angles, params.sin + angles, (channel - (W - kRopeDim)) / 2);
  }
  if constexpr (W == kKeyDim) {
    if (params.hadamard) hadamard_transform(x);
  }
  store_four(entry, x);
}

template <int W, int kGroups, int kSplits>
void launch(CUstream_st* stream, const CompressParams& params) {
  with_element(params.projections.element, [&](auto element) {
    compress_kernel<W, kGroups, kSplits, decltype(element)>
        <<<params.closing, dim3(W / 4, kSplits), 0, stream>>>(params);
  });
}

}  // namespace

const char* compress(CUstream_st* stream, const CompressParams& params) {
  if (params.closing == 0) return nullptr;
  if (params.tail.geometry.overlaps()) {
    params.tail.width == kHeadDim ? launch<kHeadDim, 1, 1>(stream, params) : launch<kKeyDim, 1, 1>(stream, params);
  } else if (params.tail.width == kHeadDim) {
    launch<kHeadDim, kHcaRatio / kGroupRows, 4>(stream, params);
  } else {
    return "compress: an HCA tail has width 512";
  }
  return launch_error();
}

}  // namespace dsv4::cuda
