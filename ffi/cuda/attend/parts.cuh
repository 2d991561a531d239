// Merging the parts of tokens whose rows several clusters share: one warp to a head.
#pragma once

#include "cuda/attend/finish.cuh"
#include "cuda/core/warp_rows.cuh"

namespace dsv4::cuda::attention {

constexpr int kMergeWarps = 4;

// Channels 2 pair and 2 pair + 1 of the output.
__device__ __forceinline__ void rotate_pair_back(const AttendParams& params, int token, int pair, float& x, float& y) {
  constexpr int kFirst = (kHeadDim - kRopeDim) / 2;
  if (params.cos == nullptr || pair < kFirst) return;
  const int angle = token * (kRopeDim / 2) + pair - kFirst;
  const float cos = params.cos[angle], sin = params.sin[angle], rotated = x * cos + y * sin;
  y = y * cos - x * sin;
  x = rotated;
}

static __global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_parts_kernel(const __grid_constant__ AttendParams params) {
  const int lane = threadIdx.x % kWarp, head = blockIdx.x * kMergeWarps + threadIdx.x / kWarp, token = blockIdx.y;
  if (head >= params.heads || !attended_rows(params, token).valid) return;
  const int64_t row = static_cast<int64_t>(token) * params.heads + head;
  const int64_t rows = static_cast<int64_t>(params.plan.tokens) * params.heads;
  const auto* shares = reinterpret_cast<const float2*>(params.part_shares);

  float peak = -INFINITY, total = 0.0f;
  for (int part = 0; part < params.parts; ++part) peak = fmaxf(peak, shares[part * rows + row].x);
  WarpRow<kHeadDim> sum{};
  if (peak > -INFINITY) {
#pragma unroll 4
    for (int part = 0; part < params.parts; ++part) {
      const float2 share = shares[part * rows + row];
      const float factor = exp2f(share.x - peak);
      total += share.y * factor;
#pragma unroll
      for (int quad = 0; quad < WarpRow<kHeadDim>::kQuads; ++quad) {
        float four[4];
        load_values(params.part_rows + (part * rows + row) * kHeadDim + channel_of(quad, lane), four);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.x[quad][i] = fmaf(four[i], factor, sum.x[quad][i]);
      }
    }
  }
  if (lane == 0) params.lse[row] = log_of_sum(peak, total);
  const float factor = total > 0.0f ? 1.0f / (total + share_of_sink(sink_of_head(params, head), peak)) : 0.0f;
#pragma unroll
  for (int quad = 0; quad < WarpRow<kHeadDim>::kQuads; ++quad) {
    float (&four)[4] = sum.x[quad];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] *= factor;
    const int channel = channel_of(quad, lane);
    rotate_pair_back(params, token, channel / 2, four[0], four[1]);
    rotate_pair_back(params, token, channel / 2 + 1, four[2], four[3]);
    if (params.output_element == Element::kFloat32) {
      store_values(static_cast<float*>(params.output) + row * kHeadDim + channel, four);
    } else {
      store_values(static_cast<bfloat16*>(params.output) + row * kHeadDim + channel, four);
    }
  }
}

}  // namespace dsv4::cuda::attention
