// The products of attention in float32, without tensor cores: for rows stored as float32.
#pragma once

#include "cuda/attend/portable.cuh"

namespace dsv4::cuda::attention {

// A thread multiplies one query with one row, and sums two neighbouring channels of every head.
struct ExactProducts {
  using Shared = PortableShared<float, 8>;

  float sums[kPortableHeads][2];

  __device__ __forceinline__ ExactProducts() {
#pragma unroll
    for (int head = 0; head < kPortableHeads; ++head) sums[head][0] = sums[head][1] = 0.0f;
  }

  __device__ __forceinline__ void multiply(Shared& shared) const {
    const int head = threadIdx.x / Shared::kRows, row = threadIdx.x % Shared::kRows;
    float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int channel = 0; channel < kHeadDim; channel += 4) {
      float query[4], value[4];
      load_values(shared.queries[head] + channel, query);
      load_values(shared.rows[row] + channel, value);
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = fmaf(query[i], value[i], four[i]);
    }
    shared.logits[head][row] = (four[0] + four[1]) + (four[2] + four[3]);
  }

  __device__ __forceinline__ void add(const Shared& shared) {
    const int channel = 2 * threadIdx.x;
#pragma unroll
    for (int head = 0; head < kPortableHeads; ++head) {
      sums[head][0] *= shared.shrink[head], sums[head][1] *= shared.shrink[head];
    }
    for (int row = 0; row < Shared::kRows; ++row) {
      float two[2];
      load_values(shared.rows[row] + channel, two);
#pragma unroll
      for (int head = 0; head < kPortableHeads; ++head) {
        const float weight = shared.weights[head][row];
        sums[head][0] = fmaf(weight, two[0], sums[head][0]);
        sums[head][1] = fmaf(weight, two[1], sums[head][1]);
      }
    }
  }

  __device__ __forceinline__ void store(const AttendParams& params, const Shared& shared, int token, int first_head) {
#pragma unroll
    for (int place = 0; place < kPortableHeads; ++place) {
      const int head = first_head + place;
      if (head >= params.heads) return;
      const float factor = finishing_factor(params, shared, token, head, place, threadIdx.x == 0);
      store_pair(params, token, head, 2 * threadIdx.x, sums[place][0] * factor, sums[place][1] * factor);
    }
  }
};

}  // namespace dsv4::cuda::attention
