// From sums over a block's keys to the output. Two blocks of a cluster send each other half of their sums; more than
// two leave them in global memory, which is faster than the way between their shared memories. Each finishes its own
// columns for all heads.
#pragma once

#include "cuda/attend/shared.cuh"
#include "cuda/attend/unseen.cuh"

namespace dsv4::cuda::attention {

// Natural, from a maximum in base 2.
__device__ __forceinline__ float log_of_sum(float peak, float total) {
  return total > 0.0f ? (peak + log2f(total)) * 0.6931471805599453f : -INFINITY;
}

// What a head's sink adds to its sum, in units of the peak.
__device__ __forceinline__ float share_of_sink(float sink, float peak) { return exp2f(sink * kLog2E - peak); }

__device__ __forceinline__ float sink_of_head(const AttendParams& params, int head) {
  return params.sinks == nullptr || head >= params.heads ? -INFINITY : __ldg(params.sinks + head);
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
    store_there(in_block(shared.share_at(rank, row), there), peak[0], total[0]);
    store_there(in_block(shared.share_at(rank, row + 8), there), peak[1], total[1]);
  }
}

// Where a block's heads go: to the output, or to a part's workspace.
struct Destination {
  bool partial;
  int part;
  int token;
  int first_head;
  int cluster;  // of all

  __device__ __forceinline__ int64_t row(const AttendParams& params, int head) const {
    const int64_t token_row = partial ? static_cast<int64_t>(part) * params.plan.tokens + token : token;
    return token_row * params.heads + first_head + head;
  }
  __device__ __forceinline__ uint8_t* rows(const AttendParams& params) const {
    return partial ? reinterpret_cast<uint8_t*>(params.part_rows) : static_cast<uint8_t*>(params.output);
  }
};

__device__ __forceinline__ Destination destination(const AttendParams& params, int token, int first_head, int blocks) {
  const int part = static_cast<int>(blockIdx.x) / blocks;
  const int groups = gridDim.z, cluster = (part * params.plan.tokens + token) * groups + static_cast<int>(blockIdx.z);
  return {params.parts > 1, part, token, first_head, cluster};
}

// What each block's sums of a head are multiplied by, in place of its share of the softmax; by warpgroups 0 and 1, four
// threads to a head. Tells lse, or a part's share.
__device__ __forceinline__ void weigh_blocks(const AttendParams& params, const Shared& shared, const Destination& to,
                                             int rank, int blocks, float sink) {
  const int row = threadIdx.x / 4, first = threadIdx.x % 4, head = to.first_head + row;
  float peak = -INFINITY, total = 0.0f;
  for (int block = first; block < blocks; block += 4) peak = fmaxf(peak, shared.share(block, row)->x);
  peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, 1));
  peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, 2));
  const float base = peak > -INFINITY ? peak : 0.0f;
  for (int block = first; block < blocks; block += 4) {
    const float2 share = *shared.share(block, row);
    total = fmaf(share.y, exp2f(share.x - base), total);
  }
  total += __shfl_xor_sync(kAll, total, 1);
  total += __shfl_xor_sync(kAll, total, 2);
  const bool exists = head < params.heads, tells = exists && rank == 0 && first == 0;
  float normalizer = total > 0.0f ? 1.0f : 0.0f;
  if (to.partial) {
    if (tells) reinterpret_cast<float2*>(params.part_shares)[to.row(params, row)] = float2{peak, total};
  } else {
    if (tells) params.lse[to.row(params, row)] = log_of_sum(peak, total);
    if (exists && total > 0.0f) normalizer = 1.0f / (total + share_of_sink(sink, peak));
  }
  for (int block = first; block < blocks; block += 4) {
    float2* share = shared.share(block, row);
    share->x = exp2f(share->x - base) * normalizer;
  }
  meet(2, 256);
}

// Eight columns of the output, those of a quad: two of row `row` and two of row `row` + 8.
struct Columns {
  float x[4];
};

// The angle by which columns are rotated back if they are RoPE's. `eight` is which eight of the 512.
struct Angle {
  float cos = 1.0f, sin = 0.0f;

  Angle() = default;
  __device__ __forceinline__ Angle(const AttendParams& params, const Destination& to, int eight, int pair) {
    constexpr int kFirst = (kHeadDim - kRopeDim) / 8;
    if (to.partial || params.cos == nullptr || eight < kFirst) return;
    const int angle = to.token * (kRopeDim / 2) + (eight - kFirst) * 4 + pair;
    cos = __ldg(params.cos + angle), sin = __ldg(params.sin + angle);
  }
  __device__ __forceinline__ void rotate_back(Columns& part) const {
    if (cos == 1.0f && sin == 0.0f) return;  // infinity times 0 is none
    part = {{part.x[0] * cos + part.x[1] * sin, part.x[1] * cos - part.x[0] * sin, part.x[2] * cos + part.x[3] * sin,
             part.x[3] * cos - part.x[2] * sin}};
  }
};

// Output rows of so many columns in shared memory, numbers of kBytes bytes, a little apart; and from there to the
// output 16 bytes at a time.
template <int kColumns, int kBytes>
struct OutputRows {
  static constexpr int kPitch = kColumns * kBytes + 16;
  static constexpr int kUnits = kColumns * kBytes / 16;
  uint32_t start;

  __device__ __forceinline__ void put(int row, int column, const Columns& part) const {
    const uint32_t to = start + row * kPitch + column * kBytes;
    if constexpr (kBytes == 2) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(two_bfloat16(part.x[0], part.x[1])) : "memory");
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 8 * kPitch), "r"(two_bfloat16(part.x[2], part.x[3]))
                   : "memory");
    } else {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(part.x[0]), "f"(part.x[1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * kPitch), "f"(part.x[2]), "f"(part.x[3])
                   : "memory");
    }
  }
  template <int kSenders>
  __device__ __forceinline__ void send(const AttendParams& params, const Destination& to, int first_column,
                                       int thread) const {
    const int units = min(kTileHeads, params.heads - to.first_head) * kUnits;
    uint8_t* const out = to.rows(params) + (to.row(params, 0) * kHeadDim + first_column) * kBytes;
#pragma unroll 4
    for (int i = thread; i < units; i += kSenders) {
      const int row = i / kUnits, unit = i % kUnits;
      const uint4 x = *Shared::pointer<uint4>(start + row * kPitch + unit * 16);
      *reinterpret_cast<uint4*>(out + row * (kHeadDim * kBytes) + unit * 16) = x;
    }
  }
};

// Calls `store(bytes of a number of the output)`.
template <class Store>
__device__ __forceinline__ void with_bytes(const AttendParams& params, const Destination& to, Store&& store) {
  if (to.partial || params.output_element == Element::kFloat32) {
    store(std::integral_constant<int, 4>{});
  } else {
    store(std::integral_constant<int, 2>{});
  }
}

// One block alone, or the warpgroup of two blocks that has received the other block's sums.
__device__ __forceinline__ void store_half(const AttendParams& params, const Shared& shared, const Destination& to,
                                           int half, bool alone, const float (&sum)[128], const float (&factor)[2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  constexpr int kRopeEights = kRopeDim / 8;
  Angle angles[kRopeEights];  // of the last eights, loaded at once
#pragma unroll
  for (int i = 0; i < kRopeEights; ++i) angles[i] = {params, to, half * 32 + 32 - kRopeEights + i, lane % 4};
  with_bytes(params, to, [&](auto bytes) {
    using Rows = OutputRows<kHeadDim / 2, bytes>;
    const Rows rows{shared.output() + (alone ? half * kTileHeads * Rows::kPitch : 0)};
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      Columns part{
          {sum[4 * j] * factor[0], sum[4 * j + 1] * factor[0], sum[4 * j + 2] * factor[1], sum[4 * j + 3] * factor[1]}};
      if (j >= 32 - kRopeEights) angles[j - 32 + kRopeEights].rotate_back(part);
      rows.put(warp * 16 + lane / 4, 8 * j + lane % 4 * 2, part);
    }
    meet(3 + half, 128);
    rows.template send<128>(params, to, half * (kHeadDim / 2), threadIdx.x % 128);
  });
}

// Where a block leaves its sums: [eight columns of 64][128 threads], each thread's four of both rows side by side.
__device__ __forceinline__ float4* sums_of_block(const AttendParams& params, const Destination& to, int rank,
                                                 int blocks) {
  return reinterpret_cast<float4*>(params.block_sums) + (static_cast<int64_t>(to.cluster) * blocks + rank) * (64 * 128);
}

__device__ __forceinline__ void leave_sums(float4* to, int half, const float (&sum)[128]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    __stcg(to + (half * 32 + j) * 128 + thread, float4{sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]});
  }
}

// Four blocks or more: each takes the sums of 512 / kBlocks columns from all that saw any row.
template <int kBlocks>
__device__ __forceinline__ void gather_sums(const AttendParams& params, const Shared& shared, const Destination& to,
                                            int rank, int half) {
  constexpr int kEights = 64 / kBlocks;  // eights of columns for a block
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, row = warp * 16 + lane / 4;
  with_bytes(params, to, [&](auto bytes) {
    const OutputRows<8 * kEights, bytes> rows{shared.output()};
#pragma unroll 2
    for (int b = half; b < kEights; b += 2) {
      const Angle angle{params, to, rank * kEights + b, lane % 4};
      const float4* from = sums_of_block(params, to, 0, kBlocks) + (rank * kEights + b) * 128 + thread;
      float4 left[kBlocks];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        left[block] = float4{0.0f, 0.0f, 0.0f, 0.0f};
        // Whether the block saw any row is the same for all heads. A NaN is something.
        if (!(shared.share(block, 0)->y == 0.0f)) left[block] = __ldcg(from + block * (64 * 128));
      }
      Columns part{{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float first = shared.share(block, row)->x, second = shared.share(block, row + 8)->x;
        part.x[0] = fmaf(left[block].x, first, part.x[0]), part.x[1] = fmaf(left[block].y, first, part.x[1]);
        part.x[2] = fmaf(left[block].z, second, part.x[2]), part.x[3] = fmaf(left[block].w, second, part.x[3]);
      }
      angle.rotate_back(part);
      rows.put(row, 8 * b + lane % 4 * 2, part);
    }
    meet(2, 256);
    rows.template send<256>(params, to, rank * 8 * kEights, threadIdx.x);
  });
}

// Warps that neither sum nor finish, in a cluster: its barriers, of which `finish` has the others.
__device__ __forceinline__ void leave_to_sums(int blocks) {
  if (blocks == 1) return;
  cluster_wait();
  cluster_sync();
  if (blocks == 2) cluster_sync();
}

// Warpgroups 0 and 1, after all their tiles.
__device__ __forceinline__ void finish(const AttendParams& params, const Shared& shared, const Destination& to,
                                       int rank, int blocks, int half, float (&sum)[128]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, thread = threadIdx.x % 128;
  const int row = warp * 16 + lane / 4;
  const float sink = sink_of_head(params, to.first_head + static_cast<int>(threadIdx.x) / 4);
  if (blocks == 1) {
    meet(2, 256);
  } else {
    if (half == 1) cluster_wait();
    if (blocks > 2) leave_sums(sums_of_block(params, to, rank, blocks), half, sum);
    cluster_sync();
  }
  weigh_blocks(params, shared, to, rank, blocks, sink);
  const float factor[2] = {shared.share(rank, row)->x, shared.share(rank, row + 8)->x};
  switch (blocks) {
    case 1:
      store_half(params, shared, to, half, true, sum, factor);
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
      store_half(params, shared, to, half, false, sum, once);
      return;
    }
    case 4:
      return gather_sums<4>(params, shared, to, rank, half);
    case 8:
      return gather_sums<8>(params, shared, to, rank, half);
    case 16:
      return gather_sums<16>(params, shared, to, rank, half);
    default:
      return;
  }
}

}  // namespace dsv4::cuda::attention
