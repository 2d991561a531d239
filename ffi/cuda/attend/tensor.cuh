// The products of attention by tensor cores in bfloat16 with float32 sums (mma.sync, sm_80 on).
#pragma once

#include "cuda/attend/portable.cuh"

namespace dsv4::cuda::attention {

// Four 8x8 matrices of 16 bits; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_fragment(const bfloat16* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ __forceinline__ void load_transposed(const bfloat16* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// D[16, 8] += A[16, 16] B[16, 8].
__device__ __forceinline__ void mma_16x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A warp multiplies 16 heads with 8 rows, and sums 128 channels of 16 heads. Of both a thread holds heads lane / 4 and
// lane / 4 + 8 and, of each eight columns, two.
struct TensorProducts {
  using Shared = PortableShared<bfloat16, 32>;
  static constexpr int kEights = kHeadDim / 4 / 8;

  float sums[kEights][4];

  __device__ __forceinline__ TensorProducts() {
#pragma unroll
    for (int i = 0; i < kEights; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
  }

  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarp; }
  __device__ __forceinline__ static int heads() { return threadIdx.x / kWarp % 2 * 16; }
  __device__ __forceinline__ static int quarter() { return threadIdx.x / kWarp / 2; }  // of rows, and of channels

  __device__ __forceinline__ void multiply(Shared& shared) const {
    const bfloat16* query = shared.queries[heads() + lane() % 16] + lane() / 16 * 8;
    const bfloat16* row = shared.rows[quarter() * 8 + lane() % 8] + lane() / 8 * 8;
    float product[2][4] = {};
#pragma unroll 4
    for (int channel = 0; channel < kHeadDim; channel += 32) {
      uint32_t first[4], second[4], values[4];
      load_fragment(query + channel, first);
      load_fragment(query + channel + 16, second);
      load_fragment(row + channel, values);
      mma_16x8(product[0], first, values[0], values[1]);
      mma_16x8(product[1], second, values[2], values[3]);
    }
    float* logits = shared.logits[heads() + lane() / 4] + quarter() * 8 + lane() % 4 * 2;
    constexpr int kEightHeads = 8 * (Shared::kRows + 1);
    logits[0] = product[0][0] + product[1][0], logits[1] = product[0][1] + product[1][1];
    logits[kEightHeads] = product[0][2] + product[1][2], logits[kEightHeads + 1] = product[0][3] + product[1][3];
  }

  __device__ __forceinline__ void add(const Shared& shared) {
    const float first = shared.shrink[heads() + lane() / 4], second = shared.shrink[heads() + lane() / 4 + 8];
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      sums[i][0] *= first, sums[i][1] *= first;
      sums[i][2] *= second, sums[i][3] *= second;
    }
#pragma unroll
    for (int k = 0; k < Shared::kRows; k += 16) {
      uint32_t weights[4];
      load_fragment(shared.weights[heads() + lane() % 16] + k + lane() / 16 * 8, weights);
      const bfloat16* row = shared.rows[k + lane() % 16] + quarter() * (kHeadDim / 4) + lane() / 16 * 8;
#pragma unroll
      for (int i = 0; i < kEights; i += 2) {
        uint32_t values[4];
        load_transposed(row + 8 * i, values);
        mma_16x8(sums[i], weights, values[0], values[1]);
        mma_16x8(sums[i + 1], weights, values[2], values[3]);
      }
    }
  }

  __device__ __forceinline__ void store(const AttendParams& params, const Shared& shared, int token,
                                        int first_head) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = heads() + lane() / 4 + 8 * half, head = first_head + place;
      if (head >= params.heads) continue;
      const bool tells = quarter() == 0 && lane() % 4 == 0;
      const float factor = finishing_factor(params, shared, token, head, place, tells);
#pragma unroll
      for (int i = 0; i < kEights; ++i) {
        const int channel = quarter() * (kHeadDim / 4) + 8 * i + lane() % 4 * 2;
        store_pair(params, token, head, channel, sums[i][2 * half] * factor, sums[i][2 * half + 1] * factor);
      }
    }
  }
};

}  // namespace dsv4::cuda::attention
