// From sums over a block's keys to the output: the blocks of a cluster exchange what they have, each finishes its own
// columns for all heads.
#pragma once

#include "cuda/attend/shared.cuh"
#include "cuda/attend/unseen.cuh"

namespace dsv4::cuda::attention {

// Natural, from a maximum in base 2.
__device__ __forceinline__ float log_of_sum(float peak, float total) {
  return total > 0.0f ? (peak + log2f(total)) * 0.6931471805599453f : -INFINITY;
}

__device__ __forceinline__ float sink_of_head(const AttendParams& params, int head, float peak) {
  return params.sinks == nullptr ? 0.0f : exp2f(params.sinks[head] * kLog2E - peak);
}

// Warpgroup 0 tells every block its part of the softmax.
__device__ __forceinline__ void publish(const Shared& shared, int rank, int blocks, const float (&peak)[2],
                                        float (&total)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] += __shfl_xor_sync(kAll, total[i], 1);
    total[i] += __shfl_xor_sync(kAll, total[i], 2);
  }
  if (blocks > 1) cluster_wait();
  for (int there = lane % 4; there < blocks; there += 4) {
    store_there(in_block(shared.share(rank, row), there), peak[0], total[0]);
    store_there(in_block(shared.share(rank, row + 8), there), peak[1], total[1]);
  }
}

// Where a block's heads go: to the output, or to a part's workspace.
struct Destination {
  bool partial;
  int part;
  int token;
  int first_head;

  __device__ __forceinline__ int bytes(const AttendParams& params) const {
    return partial || params.output_element == Element::kFloat32 ? 4 : 2;
  }
  __device__ __forceinline__ int64_t row(const AttendParams& params, int head) const {
    const int64_t token_row = partial ? static_cast<int64_t>(part) * params.plan.tokens + token : token;
    return token_row * params.heads + first_head + head;
  }
  __device__ __forceinline__ uint8_t* rows(const AttendParams& params) const {
    return partial ? reinterpret_cast<uint8_t*>(params.part_rows) : static_cast<uint8_t*>(params.output);
  }
};

// What this block's sums of one head are multiplied by.
__device__ __forceinline__ float factor_of_row(const AttendParams& params, const Shared& shared, const Destination& to,
                                               int rank, int blocks, int row, bool tells) {
  float peak = -INFINITY;
  for (int block = 0; block < blocks; ++block) {
    peak = fmaxf(peak, Shared::pointer<float2>(shared.share(block, row))->x);
  }
  float total = 0.0f, mine = 0.0f;
  if (peak > -INFINITY) {
    for (int block = 0; block < blocks; ++block) {
      const float2 share = *Shared::pointer<float2>(shared.share(block, row));
      const float factor = exp2f(share.x - peak);
      total += share.y * factor;
      if (block == rank) mine = factor;
    }
  }
  const int head = to.first_head + row;
  if (head >= params.heads) return 0.0f;
  if (to.partial) {
    if (tells) reinterpret_cast<float2*>(params.part_shares)[to.row(params, row)] = float2{peak, total};
    return mine;
  }
  if (tells) params.lse[to.row(params, row)] = log_of_sum(peak, total);
  return total > 0.0f ? mine / (total + sink_of_head(params, head, peak)) : 0.0f;
}

// Eight columns of the output, those of a quad: two of row `row` and two of row `row` + 8.
struct Columns {
  float x[4];
};

// Rotates columns back by the token's position if they are RoPE's. `eight` is which eight of the 512.
__device__ __forceinline__ void rotate_back(const AttendParams& params, int token, int eight, int pair, Columns& part) {
  constexpr int kFirst = (kHeadDim - kRopeDim) / 8;
  if (params.cos == nullptr || eight < kFirst) return;
  const int angle = token * (kRopeDim / 2) + (eight - kFirst) * 4 + pair;
  const float cos = params.cos[angle], sin = params.sin[angle];
  part = {{part.x[0] * cos + part.x[1] * sin, part.x[1] * cos - part.x[0] * sin, part.x[2] * cos + part.x[3] * sin,
           part.x[3] * cos - part.x[2] * sin}};
}

// Output rows in shared memory, `pitch` bytes each, and from there to the output by the copy engine.
struct OutputRows {
  uint32_t start;
  int columns;
  int bytes;  // of a number

  __device__ __forceinline__ int pitch() const { return columns * bytes + 16; }
  __device__ __forceinline__ void put(int row, int column, const Columns& part) const {
    const uint32_t to = start + row * pitch() + column * bytes;
    if (bytes == 2) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(two_bfloat16(part.x[0], part.x[1])) : "memory");
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 8 * pitch()), "r"(two_bfloat16(part.x[2], part.x[3]))
                   : "memory");
    } else {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(part.x[0]), "f"(part.x[1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * pitch()), "f"(part.x[2]), "f"(part.x[3])
                   : "memory");
    }
  }
  __device__ __forceinline__ void send(const AttendParams& params, const Destination& to, int first_column,
                                       int thread) const {
    if (thread >= kTileHeads || to.first_head + thread >= params.heads) return;
    const int64_t place = to.row(params, thread) * kHeadDim + first_column;
    bulk_store(to.rows(params) + place * bytes, start + thread * pitch(), columns * bytes);
    wait_for_bulk_stores();
  }
};

// One block alone, or the warpgroup of two blocks that has received the other block's sums.
__device__ __forceinline__ void store_half(const AttendParams& params, const Destination& to, int half, uint32_t start,
                                           const float (&sum)[128], const float (&factor)[2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const OutputRows rows{start, kHeadDim / 2, to.bytes(params)};
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    Columns part{
        {sum[4 * j] * factor[0], sum[4 * j + 1] * factor[0], sum[4 * j + 2] * factor[1], sum[4 * j + 3] * factor[1]}};
    if (!to.partial) rotate_back(params, to.token, half * 32 + j, lane % 4, part);
    rows.put(warp * 16 + lane / 4, 8 * j + lane % 4 * 2, part);
  }
  fence_async();
  meet(3 + half, 128);
  rows.send(params, to, half * (kHeadDim / 2), threadIdx.x % 128);
}

// Four blocks or more: each takes the sums of 512 / kBlocks columns from all.
template <int kBlocks>
__device__ __forceinline__ void exchange(const AttendParams& params, const Shared& shared, const Destination& to,
                                         int rank, int half, const float (&sum)[128], const float (&factor)[2]) {
  constexpr int kEights = 64 / kBlocks;  // eights of columns for a block
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < kBlocks / 2; ++i) {
    const uint32_t there = in_block(shared.parts(), half * (kBlocks / 2) + i);
#pragma unroll
    for (int b = 0; b < kEights; ++b) {
      const int j = i * kEights + b;
      store_there(there + ((rank * kEights + b) * 128 + thread) * 16, sum[4 * j] * factor[0],
                  sum[4 * j + 1] * factor[0], sum[4 * j + 2] * factor[1], sum[4 * j + 3] * factor[1]);
    }
  }
  cluster_sync();
  const OutputRows rows{shared.output(), 8 * kEights, to.bytes(params)};
  const int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int b = half; b < kEights; b += 2) {
    Columns part{{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const float4 sent = *Shared::pointer<float4>(shared.parts() + ((block * kEights + b) * 128 + thread) * 16);
      part.x[0] += sent.x, part.x[1] += sent.y, part.x[2] += sent.z, part.x[3] += sent.w;
    }
    if (!to.partial) rotate_back(params, to.token, rank * kEights + b, lane % 4, part);
    rows.put(warp * 16 + lane / 4, 8 * b + lane % 4 * 2, part);
  }
  fence_async();
  meet(2, 256);
  rows.send(params, to, rank * 8 * kEights, threadIdx.x);
}

// Warpgroups 0 and 1, after all their tiles.
__device__ __forceinline__ void finish(const AttendParams& params, const Shared& shared, const Destination& to,
                                       int rank, int blocks, int half, float (&sum)[128]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, thread = threadIdx.x % 128;
  const int row = warp * 16 + lane / 4;
  if (blocks == 1) {
    meet(2, 256);
  } else {
    if (half == 1) cluster_wait();
    cluster_sync();
  }
  const bool tells = half == 0 && rank == 0 && lane % 4 == 0;
  const float factor[2] = {factor_of_row(params, shared, to, rank, blocks, row, tells),
                           factor_of_row(params, shared, to, rank, blocks, row + 8, tells)};
  switch (blocks) {
    case 1:
      store_half(params, to, half, shared.output() + half * kTileHeads * (kHeadDim / 2 * to.bytes(params) + 16), sum,
                 factor);
      return;
    case 2: {
      const uint32_t there = in_block(shared.parts() + thread * 16, rank ^ 1);
      if (half != rank) {
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          store_there(there + j * 2048, sum[4 * j] * factor[0], sum[4 * j + 1] * factor[0], sum[4 * j + 2] * factor[1],
                      sum[4 * j + 3] * factor[1]);
        }
      }
      cluster_sync();
      if (half != rank) return;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float4 sent = *Shared::pointer<float4>(shared.parts() + thread * 16 + j * 2048);
        sum[4 * j] = fmaf(sum[4 * j], factor[0], sent.x), sum[4 * j + 1] = fmaf(sum[4 * j + 1], factor[0], sent.y);
        sum[4 * j + 2] = fmaf(sum[4 * j + 2], factor[1], sent.z),
                    sum[4 * j + 3] = fmaf(sum[4 * j + 3], factor[1], sent.w);
      }
      meet(3 + half, 128);  // a float32 output reaches into where the other block's sums were
      const float once[2] = {1.0f, 1.0f};
      store_half(params, to, half, shared.output(), sum, once);
      return;
    }
    case 4:
      return exchange<4>(params, shared, to, rank, half, sum, factor);
    case 8:
      return exchange<8>(params, shared, to, rank, half, sum, factor);
    case 16:
      return exchange<16>(params, shared, to, rank, half, sum, factor);
    default:
      return;
  }
}

}  // namespace dsv4::cuda::attention
