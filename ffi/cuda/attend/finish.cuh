// From sums over a block's keys to the output. Two blocks of a cluster send each other half of their sums; more than
// two leave them in global memory, which is faster than the way between their shared memories. Each finishes its own
// columns for all heads.
//
// All threads of all blocks meet at the cluster's barrier, of a single block too: when all of them run; of one or two
// blocks, when all have told their share of the softmax and are done with their queries; of several blocks, when all
// sums are where they are taken from.
#pragma once

#include "cuda/attend/shared.cuh"
#include "cuda/attend/unseen.cuh"

namespace dsv4::cuda::attention {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Natural, from a maximum in base 2.
__device__ __forceinline__ float log_of_sum(float peak, float total) {
  return total > 0.0f ? (peak + log2f(total)) * 0.6931471805599453f : -INFINITY;
}

// What a head's sink adds to its sum, in units of the peak.
__device__ __forceinline__ float share_of_sink(float sink, float peak) { return exp2f(sink * kLog2E - peak); }

__device__ __forceinline__ float sink_of_head(const AttendParams& params, int head) {
  return params.sinks == nullptr || head >= params.heads ? -INFINITY : __ldg(params.sinks + head);
}

// A thread's first two meetings that has nothing to tell. Where there are more than two blocks, shares are told by the
// next barrier.
__device__ __forceinline__ void tell_nothing() {
  cluster_wait();
  if (cluster_size() <= 2) cluster_arrive_with_nothing();
}

// Warps that neither sum nor finish.
__device__ __forceinline__ void leave_to_sums() {
  tell_nothing();
  if (cluster_size() <= 2) cluster_wait();
  if (cluster_size() > 1) cluster_arrive_with_nothing(), cluster_wait();
}

// Warpgroup 0 tells every block its part of the softmax.
__device__ __forceinline__ void publish(const Shared& shared, const float (&peak)[2], float (&total)[2]) {
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] += __shfl_xor_sync(kAll, total[i], 1);
    total[i] += __shfl_xor_sync(kAll, total[i], 2);
  }
  cluster_wait();
  for (int there = lane % 4; there < blocks; there += 4) {
    store_there(in_block(shared.share_at(rank, row), there), peak[0], total[0]);
    store_there(in_block(shared.share_at(rank, row + 8), there), peak[1], total[1]);
  }
  __syncwarp();
  if (blocks <= 2) cluster_arrive();
}

__device__ __forceinline__ int block_index_y() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index));
  return index;
}
__device__ __forceinline__ int block_index_z() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(index));
  return index;
}

// Where a block's heads go: to the output, or to a part's workspace.
struct Destination {
  bool partial;
  bool wide;  // float32
  int part;
  int token;
  int first_head;
  int heads;  // of the block

  __device__ __forceinline__ int64_t row(const AttendParams& params, int head) const {
    const int64_t token_row = partial ? static_cast<int64_t>(part) * params.plan.tokens + token : token;
    return token_row * params.heads + first_head + head;
  }
  __device__ __forceinline__ uint8_t* rows(const AttendParams& params) const {
    return partial ? reinterpret_cast<uint8_t*>(params.part_rows) : static_cast<uint8_t*>(params.output);
  }
};

// What the blocks' sums of a warp's 16 heads are multiplied by: a lane holds those of head lane / 2 and of blocks
// lane % 2, lane % 2 + 2, …
template <int kBlocks>
struct BlockFactors {
  float factor[(kBlocks + 1) / 2];

  __device__ __forceinline__ float of(int block, int head) const {
    return __shfl_sync(kAll, factor[block / 2], 2 * head + block % 2);
  }
};

// Tells lse, too, or a part's share.
template <int kBlocks>
__device__ __forceinline__ BlockFactors<kBlocks> weigh_blocks(const AttendParams& params, const Shared& shared,
                                                              const Destination& to, bool tells, float sink) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 2;
  constexpr int kShares = (kBlocks + 1) / 2;
  float2 share[kShares];
  float peak = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kShares; ++i) {
    const int block = 2 * i + lane % 2;
    share[i] = block < kBlocks ? *shared.share(block, row) : float2{-INFINITY, 0.0f};
    peak = fmaxf(peak, share[i].x);
  }
  peak = fmaxf(peak, __shfl_xor_sync(kAll, peak, 1));
  const float base = peak > -INFINITY ? peak : 0.0f;
  BlockFactors<kBlocks> factors;
#pragma unroll
  for (int i = 0; i < kShares; ++i) {
    factors.factor[i] = exp2_fast(share[i].x - base);
    total = fmaf(share[i].y, factors.factor[i], total);
  }
  total += __shfl_xor_sync(kAll, total, 1);
  tells = tells && lane % 2 == 0 && row < to.heads;
  float normalizer = total > 0.0f ? 1.0f : 0.0f;
  if (to.partial) {
    if (tells) reinterpret_cast<float2*>(params.part_shares)[to.row(params, row)] = float2{peak, total};
  } else {
    if (tells) params.lse[to.row(params, row)] = log_of_sum(peak, total);
    if (total > 0.0f) normalizer = 1.0f / (total + share_of_sink(sink, peak));
  }
#pragma unroll
  for (int i = 0; i < kShares; ++i) factors.factor[i] *= normalizer;
  return factors;
}

// Eight columns of the output, those of a quad: two of row `row` and two of row `row` + 8.
struct Columns {
  float x[4];
};

// The angle by which columns are rotated back if they are RoPE's. `eight` is which eight of the 512. It is loaded
// before a barrier, to be there after it.
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

// 64 output rows of 256 columns in shared memory, numbers of kBytes bytes; and from there to the output 16 bytes at a
// time. Which unit of a row lies where depends on the row, so that eight rows lie in different banks.
template <int kBytes>
struct OutputRows {
  static constexpr int kPitch = kHeadDim / 2 * kBytes;
  static constexpr int kUnits = kPitch / 16;
  uint32_t start;

  __device__ __forceinline__ uint32_t unit(int row, int unit) const {
    return start + row * kPitch + ((unit ^ row % 8) << 4);
  }
  __device__ __forceinline__ void put(int row, int eight, int pair, const Columns& part) const {
    if constexpr (kBytes == 2) {
      const uint32_t to = unit(row, eight) + 4 * pair;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(two_bfloat16(part.x[0], part.x[1])) : "memory");
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 8 * kPitch), "r"(two_bfloat16(part.x[2], part.x[3]))
                   : "memory");
    } else {
      const uint32_t to = unit(row, 2 * eight + pair / 2) + 8 * (pair % 2);
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(part.x[0]), "f"(part.x[1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + 8 * kPitch), "f"(part.x[2]), "f"(part.x[3])
                   : "memory");
    }
  }
  __device__ __forceinline__ void send(const AttendParams& params, const Destination& to, int half) const {
    const int units = to.heads * kUnits;
    uint8_t* const out = to.rows(params) + (to.row(params, 0) * kHeadDim + half * (kHeadDim / 2)) * kBytes;
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < units; i += 128) {
      const int row = i / kUnits;
      const uint4 x = *Shared::pointer<uint4>(unit(row, i % kUnits));
      *reinterpret_cast<uint4*>(out + row * (kHeadDim * kBytes) + i % kUnits * 16) = x;
    }
  }
};

// Those of a warpgroup's last eights.
struct Angles {
  static constexpr int kEights = kRopeDim / 8;
  Angle of[kEights];

  __device__ __forceinline__ Angles(const AttendParams& params, const Destination& to, int half) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      of[i] = {params, to, half * 32 + 32 - kEights + i, static_cast<int>(threadIdx.x) % 4};
    }
  }
};

// A warpgroup's half of the columns, in units of the output, by way of shared memory at `place`.
template <int kBytes>
__device__ __forceinline__ void store_half(const AttendParams& params, const Destination& to, int half, uint32_t place,
                                           const Angles& angles, const float (&sum)[128]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const OutputRows<kBytes> rows{place};
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    Columns part{{sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]}};
    if (j >= 32 - Angles::kEights) angles.of[j - 32 + Angles::kEights].rotate_back(part);
    rows.put(warp * 16 + lane / 4, j, lane % 4, part);
  }
  meet(kHalvesMeet + half, 128);
  rows.send(params, to, half);
}

__device__ __forceinline__ void store_half(const AttendParams& params, const Destination& to, int half, uint32_t place,
                                           const Angles& angles, const float (&sum)[128]) {
  if (to.wide) {
    store_half<4>(params, to, half, place, angles, sum);
  } else {
    store_half<2>(params, to, half, place, angles, sum);
  }
}

// Where a block leaves its sums: [eight columns of 64][threads with heads], each thread's four of both rows side by
// side; and a thread among them.
__device__ __forceinline__ int threads_with_heads(const AttendParams& params) { return 2 * params.block_heads; }
__device__ __forceinline__ float4* sums_of_block(const AttendParams& params, int rank, int blocks) {
  const int64_t cluster = (static_cast<int64_t>(block_index_z()) * gridDim.y + block_index_y()) * (gridDim.x / blocks) +
                          blockIdx.x / blocks;
  return reinterpret_cast<float4*>(params.block_sums) + (cluster * blocks + rank) * (64 * threads_with_heads(params));
}

__device__ __forceinline__ void leave_sums(const AttendParams& params, float4* to, int half, const float (&sum)[128]) {
  const int threads = threads_with_heads(params), thread = threadIdx.x % 128;
  if (thread >= threads) return;
  to += half * 32 * threads + thread;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    __stcg(to, float4{sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]});
    to += threads;
    asm volatile("" : "+l"(to));  // not 32 addresses at once
  }
}

__device__ __forceinline__ void store_two(const AttendParams& params, const Destination& to, int row, int column,
                                          float a, float b) {
  if (row >= to.heads) return;
  const int64_t place = to.row(params, row) * kHeadDim + column;
  if (to.wide) {
    *reinterpret_cast<float2*>(to.rows(params) + 4 * place) = float2{a, b};
  } else {
    *reinterpret_cast<uint32_t*>(to.rows(params) + 2 * place) = two_bfloat16(a, b);
  }
}

// Four blocks or more: each takes the sums of 512 / kBlocks columns from all that saw any row.
template <int kBlocks>
__device__ __forceinline__ void gather_sums(const AttendParams& params, const Shared& shared, const Destination& to,
                                            int rank, int half, float sink, const Angle (&angles)[32 / kBlocks]) {
  constexpr int kEights = 32 / kBlocks;  // eights of columns for a warpgroup
  const int lane = threadIdx.x % 32, head = lane / 4, row = threadIdx.x / 32 % 4 * 16 + head;
  const int first_eight = (2 * rank + half) * kEights, threads = threads_with_heads(params);
  if (threadIdx.x % 128 >= threads) return;
  const float4* from = sums_of_block(params, 0, kBlocks) + first_eight * threads + threadIdx.x % 128;
  float4 left[kBlocks][kEights];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    // Whether the block saw any row is the same for all heads. A NaN is something.
    const bool saw = !(shared.share(block, 0)->y == 0.0f);
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      left[block][i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      if (saw) left[block][i] = __ldcg(from + i * threads);
    }
    from += 64 * threads;
    asm volatile("" : "+l"(from));
  }
  const auto factors = weigh_blocks<kBlocks>(params, shared, to, rank == 0 && half == 0, sink);
  Columns sum[kEights] = {};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const float first = factors.of(block, head), second = factors.of(block, head + 8);
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      float (&x)[4] = sum[i].x;
      x[0] = fmaf(left[block][i].x, first, x[0]), x[1] = fmaf(left[block][i].y, first, x[1]);
      x[2] = fmaf(left[block][i].z, second, x[2]), x[3] = fmaf(left[block][i].w, second, x[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const int eight = first_eight + i, column = 8 * eight + lane % 4 * 2;
    angles[i].rotate_back(sum[i]);
    store_two(params, to, row, column, sum[i].x[0], sum[i].x[1]);
    store_two(params, to, row + 8, column, sum[i].x[2], sum[i].x[3]);
  }
}

__device__ __forceinline__ void multiply_rows(float (&sum)[128], float first, float second) {
#pragma unroll
  for (int i = 0; i < 128; i += 4) {
    sum[i] *= first, sum[i + 1] *= first;
    sum[i + 2] *= second, sum[i + 3] *= second;
  }
}

// Where warpgroup 1 stores its rows, 0 may still be multiplying tiles, but not queries.
__device__ __forceinline__ void store_sums(const AttendParams& params, const Shared& shared, const Destination& to,
                                           int half, float sink, float (&sum)[128]) {
  const Angles angles(params, to, half);
  cluster_wait();
  const auto factors = weigh_blocks<1>(params, shared, to, half == 0, sink);
  const int head = threadIdx.x % 32 / 4;
  multiply_rows(sum, factors.of(0, head), factors.of(0, head + 8));
  store_half(params, to, half, half == 0 ? shared.tiles(0) : shared.queries(), angles, sum);
}

// Each of two blocks sends one half of its sums to the other's queries and stores the other.
__device__ __forceinline__ void exchange_sums(const AttendParams& params, const Shared& shared, const Destination& to,
                                              int rank, int half, float sink, float (&sum)[128]) {
  const Angles angles(params, to, half);
  cluster_wait();
  const int head = threadIdx.x % 32 / 4, thread = threadIdx.x % 128;
  if (half != rank) {
    const uint32_t there = in_block(shared.queries() + thread * 16, rank ^ 1);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      store_there(there + j * 2048, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    }
  }
  cluster_arrive();
  const auto factors = weigh_blocks<2>(params, shared, to, rank == 0 && half == 0, sink);
  const auto of = [&](int block, int row) { return __shfl_sync(kAll, factors.factor[0], 2 * row + block); };
  const float own[2] = {of(rank, head), of(rank, head + 8)}, other[2] = {of(rank ^ 1, head), of(rank ^ 1, head + 8)};
  cluster_wait();
  if (half != rank) return;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    const float4 sent = load_4(shared.queries() + thread * 16 + j * 2048);
    sum[4 * j] = fmaf(sum[4 * j], own[0], sent.x * other[0]);
    sum[4 * j + 1] = fmaf(sum[4 * j + 1], own[0], sent.y * other[0]);
    sum[4 * j + 2] = fmaf(sum[4 * j + 2], own[1], sent.z * other[1]);
    sum[4 * j + 3] = fmaf(sum[4 * j + 3], own[1], sent.w * other[1]);
  }
  store_half(params, to, half, shared.tiles(0), angles, sum);
}

template <int kBlocks>
__device__ __forceinline__ void leave_and_gather(const AttendParams& params, const Shared& shared,
                                                 const Destination& to, int rank, int half, float sink,
                                                 const float (&sum)[128]) {
  leave_sums(params, sums_of_block(params, rank, kBlocks), half, sum);
  cluster_arrive();
  Angle angles[32 / kBlocks];
#pragma unroll
  for (int i = 0; i < 32 / kBlocks; ++i) {
    angles[i] = {params, to, (2 * rank + half) * (32 / kBlocks) + i, static_cast<int>(threadIdx.x) % 4};
  }
  cluster_wait();
  gather_sums<kBlocks>(params, shared, to, rank, half, sink, angles);
}

// Warpgroups 0 and 1, after all their tiles and after their share of the softmax is told.
__device__ __forceinline__ void finish(const AttendParams& params, const Shared& shared, int half, float (&sum)[128]) {
  // Read again: kept over the loop over tiles, these would cost registers.
  const int token = block_index_y(), first_head = block_index_z() * params.block_heads;
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const bool partial = params.parts > 1;
  const Destination to{
      partial,    partial || params.output_element == Element::kFloat32, static_cast<int>(blockIdx.x) / blocks, token,
      first_head, min(params.block_heads, params.heads - first_head)};
  const float sink =
      sink_of_head(params, first_head + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + threadIdx.x % 32 / 2);
  switch (blocks) {
    case 1:
      return store_sums(params, shared, to, half, sink, sum);
    case 2:
      return exchange_sums(params, shared, to, rank, half, sink, sum);
    case 4:
      return leave_and_gather<4>(params, shared, to, rank, half, sink, sum);
    case 8:
      return leave_and_gather<8>(params, shared, to, rank, half, sink, sum);
    case 16:
      return leave_and_gather<16>(params, shared, to, rank, half, sink, sum);
    default:
      return;
  }
}

}  // namespace dsv4::cuda::attention
