// Attention on Hopper: one token and up to 64 of its heads to a block, or to a cluster whose blocks share its rows.
// With fewer heads products take as long, but blocks have less to tell each other.
//
// Roles of a block's warpgroups:
//   0          logits, softmax, and the weighted sum of channels 0..255
//   1          the weighted sum of channels 256..511; meanwhile, where the rows of the next tiles lie
//   2, 3       rows from the cache into tiles of 64 rows, two of them in turn
// What passes between them: `known` (where a tile's rows lie is), `described` (what they are multiplied by), `full` (a
// tile is there), `empty` (both sums are done with it), `weighed` (a tile's softmax weights are there for warpgroup 1),
// `summed` (it is done with them). All are barriers in shared memory. Named ones: kQueriesMeet, kHalvesMeet. Those of
// the cluster are in finish.cuh.
//
// Threads: 512. Registers by role: `Registers`. Shared memory: `Shared`, 226 KB, so one block to a multiprocessor.
#pragma once

#include <utility>

#include "cuda/attend/finish.cuh"
#include "cuda/attend/producer.cuh"

namespace dsv4::cuda::attention {

constexpr int kThreads = 256 + 32 * kProducerWarps;

// Registers of a thread by role, multiples of 8; together at most what the block starts with, four times 128.
template <bool kTailApart>
struct Registers {
  static constexpr int kSoftmax = 192, kSum = kTailApart ? 192 : 176, kProducer = kTailApart ? 64 : 72;
  static_assert(kSoftmax + kSum + 2 * kProducer <= 512);
};
static_assert(kThreads == 512);

// Queries of the block's heads into shared memory as bfloat16, by warpgroup 0; zeros beyond its last.
__device__ __forceinline__ void load_queries(const AttendParams& params, int token, int first_head,
                                             const Shared& shared) {
  constexpr int kUnits = kHeadDim / 8, kHeadsAtOnce = 128 / kUnits;
  const int64_t first_row = static_cast<int64_t>(token) * params.heads + first_head;
  const int heads = min(params.block_heads, params.heads - first_head), unit = threadIdx.x % kUnits;
  const auto source = [&](int head) { return (first_row + (head < heads ? head : 0)) * kHeadDim + unit * 8; };
  if (params.query_element == Element::kBFloat16) {
#pragma unroll 8
    for (int head = threadIdx.x / kUnits; head < kTileHeads; head += kHeadsAtOnce) {
      copy_async(shared.queries() + unit_offset(head, unit),
                 static_cast<const uint16_t*>(params.queries) + source(head), head < heads);
    }
    commit_copies();
    wait_for_copies<0>();
  } else {
#pragma unroll 1
    for (int head = threadIdx.x / kUnits; head < kTileHeads; head += kHeadsAtOnce) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(params.queries) + source(head));
      const float4 a = from[0], b = from[1];
      uint4 unit_of_8{two_bfloat16(a.x, a.y), two_bfloat16(a.z, a.w), two_bfloat16(b.x, b.y), two_bfloat16(b.z, b.w)};
      if (head >= heads) unit_of_8 = uint4{0, 0, 0, 0};
      store_16(shared.queries() + unit_offset(head, unit), unit_of_8);
    }
  }
  meet(kQueriesMeet, 128);
}

__device__ __forceinline__ void start(float (&sum)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) sum[i] = 0.0f;
}

// Adds products of queries and rows over sixteens kFirst .. kEnd - 1 of their channels to logits, or begins these. A
// group of its own.
template <int kFirst, int kEnd, bool kBegins>
__device__ __forceinline__ void add_logits(float (&logits)[32], const Shared& shared, int tile) {
  const Operand queries = along_rows(shared.queries()), rows = along_rows(shared.tiles(tile));
  if constexpr (!kBegins) pin(logits);
  wgmma_fence();
#pragma unroll
  for (int k = kFirst; k < kEnd; ++k) {
    const uint32_t offset = k / 4 * kTileBytes + k % 4 * 32;
    if (kBegins && k == kFirst) {
      wgmma_64x64_first(logits, queries.at(offset), rows.at(offset));
    } else {
      wgmma_64x64(logits, queries.at(offset), rows.at(offset));
    }
  }
  wgmma_commit();
}

constexpr int kSixteens = kHeadDim / 16, kCodedSixteens = (kHeadDim - kRopeDim) / 16;

// Begins a tile's logits. Where rows keep their tail apart, its products come first, in units of the others: divided by
// the row's scale.
template <bool kTailApart>
__device__ __forceinline__ void begin_logits(float (&logits)[32], const Shared& shared, int tile) {
  if constexpr (kTailApart) {
    add_logits<kCodedSixteens, kSixteens, true>(logits, shared, tile);
    wgmma_wait<0>();
    pin(logits);
    wait(shared.described(tile), tile / kAhead % 2);
    const float* factors = shared.facts(tile, kTailFactor) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * j);
      logits[4 * j] *= factor.x, logits[4 * j + 1] *= factor.y;
      logits[4 * j + 2] *= factor.x, logits[4 * j + 3] *= factor.y;
    }
    add_logits<0, kCodedSixteens, false>(logits, shared, tile);
  } else {
    add_logits<0, kSixteens, true>(logits, shared, tile);
  }
}

// Adds a tile's weighted rows, 256 channels of them from `tile` on. A group of its own.
template <int... k>
__device__ __forceinline__ void add_rows(float (&sum)[128], const uint32_t (&weights)[16], uint32_t tile,
                                         std::integer_sequence<int, k...>) {
  const Operand rows = across_rows(tile, kTileBytes);
  pin(sum);
  wgmma_fence();
  (wgmma_64x128<0, 4 * k>(sum, weights, rows.at(2 * k * kSwizzleBytes)), ...);
  (wgmma_64x128<64, 4 * k>(sum, weights, rows.at(2 * kTileBytes + 2 * k * kSwizzleBytes)), ...);
  wgmma_commit();
}

__device__ __forceinline__ void add_rows(float (&sum)[128], const uint32_t (&weights)[16], uint32_t tile) {
  add_rows(sum, weights, tile, std::make_integer_sequence<int, kTileRows / 16>{});
}

// The same with weights of their own for the last 64 channels.
template <int... k>
__device__ __forceinline__ void add_rows_and_tail(float (&sum)[128], const uint32_t (&weights)[16],
                                                  const uint32_t (&tail_weights)[16], uint32_t tile,
                                                  std::integer_sequence<int, k...>) {
  const Operand rows = across_rows(tile, kTileBytes);
  pin(sum);
  wgmma_fence();
  (wgmma_64x128<0, 4 * k>(sum, weights, rows.at(2 * k * kSwizzleBytes)), ...);
  (wgmma_64x64<64, 4 * k>(sum, weights, rows.at(2 * kTileBytes + 2 * k * kSwizzleBytes)), ...);
  (wgmma_64x64<96, 4 * k>(sum, tail_weights, rows.at(3 * kTileBytes + 2 * k * kSwizzleBytes)), ...);
  wgmma_commit();
}

// A row's weights stay in units of an older maximum until a logit exceeds it by this (a power of two of 8).
constexpr float kLazy = 8.0f;

// Warpgroup 0. A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, and of each 8 keys two. Tells the
// block's share of the softmax while the last tile is summed.
template <bool kTailApart>
__device__ __forceinline__ void softmax_and_sum(const Shared& shared, const Tiles& tiles, float (&sum)[128],
                                                float (&peak)[2], float (&total)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % 4;
  const int row = warp * 16 + lane / 4;
  const int matrix_row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
  float logits[32];
  uint32_t weights[16];
  wait(shared.full(0), 0);
  fence_async();
  begin_logits<kTailApart>(logits, shared, 0);
  for (int tile = 0;; ++tile) {
    const int parity = tile / kStages % 2;
    wgmma_wait<0>();
    pin(logits);
    if constexpr (!kTailApart) wait(shared.described(tile), tile / kAhead % 2);

    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(shared.facts(tile, kLogitFactor) + 8 * j + 2 * pair);
      const float2 exists = *reinterpret_cast<const float2*>(shared.facts(tile, kExists) + 8 * j + 2 * pair);
      logits[4 * j] = fmaf(logits[4 * j], scale.x, exists.x);
      logits[4 * j + 1] = fmaf(logits[4 * j + 1], scale.y, exists.y);
      logits[4 * j + 2] = fmaf(logits[4 * j + 2], scale.x, exists.x);
      logits[4 * j + 3] = fmaf(logits[4 * j + 3], scale.y, exists.y);
      high[0] = fmaxf(high[0], fmaxf(logits[4 * j], logits[4 * j + 1]));
      high[1] = fmaxf(high[1], fmaxf(logits[4 * j + 2], logits[4 * j + 3]));
    }
    float base[2], shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = fmaxf(high[i], __shfl_xor_sync(kAll, high[i], 1));
      high[i] = fmaxf(high[i], __shfl_xor_sync(kAll, high[i], 2));
      const bool stays = high[i] <= peak[i] + kLazy;
      const float now = stays ? peak[i] : high[i];
      base[i] = now == -INFINITY ? 0.0f : now;
      shrink[i] = stays ? 1.0f : exp2_fast(peak[i] - now);
      peak[i] = now;
      total[i] *= shrink[i];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(shared.facts(tile, kWeightFactor) + 8 * j + 2 * pair);
      const float a = exp2_fast(logits[4 * j] - base[0]), b = exp2_fast(logits[4 * j + 1] - base[0]);
      const float c = exp2_fast(logits[4 * j + 2] - base[1]), d = exp2_fast(logits[4 * j + 3] - base[1]);
      total[0] += a + b;
      total[1] += c + d;
      weights[2 * j] = two_bfloat16(a * scale.x, b * scale.y);
      weights[2 * j + 1] = two_bfloat16(c * scale.x, d * scale.y);
    }

    wait(shared.summed(tile), parity ^ 1);
    const uint32_t place = shared.weights(tile) + unit_offset(matrix_row, lane / 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_matrices(two_units_on(place, k), weights[4 * k], weights[4 * k + 1], weights[4 * k + 2],
                     weights[4 * k + 3]);
    }
    if (pair == 0) shared.shrink(tile)[row] = shrink[0], shared.shrink(tile)[row + 8] = shrink[1];
    __syncwarp();
    if (lane == 0) arrive(shared.weighed(tile));

    if (__any_sync(kAll, shrink[0] != 1.0f || shrink[1] != 1.0f)) multiply_rows(sum, shrink[0], shrink[1]);
    add_rows(sum, weights, shared.tiles(tile));
    if (tile + 1 == tiles.count) break;
    // Its place is free before the next tile is waited for: rows are decoded meanwhile.
    wgmma_wait<0>();
    pin(sum);
    if (lane == 0) arrive(shared.empty(tile));
    wait(shared.full(tile + 1), (tile + 1) / kStages % 2);
    fence_async();
    begin_logits<kTailApart>(logits, shared, tile + 1);
  }
  publish(shared, peak, total);
  wgmma_wait<0>();
  pin(sum);
}

// Warpgroup 1. Weights come for coded channels.
template <bool kTailApart, class Scout>
__device__ __forceinline__ void sum_only(const Shared& shared, const Tiles& tiles, Scout& scout, float (&sum)[128]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;
  const int matrix_row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll 1
  for (int tile = 0; tile < tiles.count; ++tile) {
    // Warpgroup 0 has made the tile visible to products before it tells.
    wait(shared.weighed(tile), tile / kStages % 2);
    const float first = shared.shrink(tile)[row], second = shared.shrink(tile)[row + 8];
    const uint32_t place = shared.weights(tile) + unit_offset(matrix_row, lane / 16);
    uint32_t weights[16];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      load_matrices(two_units_on(place, k), weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3]);
    }
    __syncwarp();
    if (lane == 0) arrive(shared.summed(tile));
    if (__any_sync(kAll, first != 1.0f || second != 1.0f)) multiply_rows(sum, first, second);
    if constexpr (kTailApart) {
      uint32_t tail_weights[16];
      const float* factors = shared.facts(tile, kTailFactor) + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * j);
        tail_weights[2 * j] = scaled(weights[2 * j], factor.x, factor.y);
        tail_weights[2 * j + 1] = scaled(weights[2 * j + 1], factor.x, factor.y);
      }
      add_rows_and_tail(sum, weights, tail_weights, shared.tiles(tile) + 4 * kTileBytes,
                        std::make_integer_sequence<int, kTileRows / 16>{});
    } else {
      add_rows(sum, weights, shared.tiles(tile) + 4 * kTileBytes);
    }
    scout.during(tile);
    wgmma_wait<0>();
    pin(sum);
    if (lane == 0) arrive(shared.empty(tile));
    scout.after(tile);
  }
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <class WindowCodec, class EntryCodec>
__global__ void __launch_bounds__(kThreads, 1) attend_kernel(const __grid_constant__ AttendParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Scouts = Scout<WindowCodec, EntryCodec>;
  constexpr bool kTailApart = Scouts::kTailApart;
  extern __shared__ uint8_t memory[];
  const Shared shared{(shared_address(memory) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes};
  const int token = blockIdx.y, first_head = blockIdx.z * params.block_heads;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  cluster_arrive_with_nothing();

  // All that waits for nothing comes first: what is planned, and chosen entries.
  const PlannedToken planned = planned_token(params, token);
  const bool chosen = params.indices != nullptr;
  Tiles tiles{};
  typename Scouts::Chosen choice{};
  if (chosen) {
    tiles = tiles_of_block(params.window_size, params.count, blockIdx.x, gridDim.x);
    if (group == 1) choice = Scouts::first_choice(params, token, tiles);
  }
  if (threadIdx.x == 0) shared.init_barriers(kScoutsOfTile, kProducerWarps);
  __syncthreads();

  const AttendedRows rows = attended_rows(params, token, planned);
  if (!rows.valid) {
    if (blockIdx.x == 0) store_unseen(params, rows, first_head, params.block_heads, kThreads);
    return;
  }
  if (!chosen) tiles = tiles_of_block(rows.window, rows.entries, blockIdx.x, gridDim.x);

  if (group >= 2) {
    give_registers<Registers<kTailApart>::kProducer>();
    Producer<WindowCodec, EntryCodec>{tiles, shared, warp - 8, lane}();
    leave_to_sums();
    return;
  }
  float sum[128];
  if (group == 1) {
    take_registers<Registers<kTailApart>::kSum>();
    Scouts scout{params, rows, tiles, shared, lane, {}};
    scout.begin(choice);
    start(sum);
    sum_only<kTailApart>(shared, tiles, scout, sum);
    tell_nothing();
    finish(params, shared, 1, sum);
  } else {
    take_registers<Registers<kTailApart>::kSoftmax>();
    float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    start(sum);
    load_queries(params, token, first_head, shared);
    if (tiles.count > 0) {
      softmax_and_sum<kTailApart>(shared, tiles, sum, peak, total);
    } else {
      publish(shared, peak, total);
    }
    finish(params, shared, 0, sum);
  }
#endif
}

}  // namespace dsv4::cuda::attention
