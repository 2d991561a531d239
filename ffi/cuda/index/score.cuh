// Indexer scores on Hopper: I[t, s] = sum over heads of w[t, h] * relu(q[t, h] . K[s]).
//
// Keys are the rows of the product, 16 a warp; they go through shared memory into the registers that wgmma takes its
// first operand from; a token's queries are the columns, in shared memory. The sum over heads is plain fp32 arithmetic:
// what adds and multiplies is idle, while tensor cores and what turns keys into their operand are busy.
//
// Threads: two warpgroups; every warp copies and multiplies for itself. Barriers: an mbarrier a stage and one for
// prepared queries; __syncthreads only where queries change. Shared memory: `Shared`, 44 to 200 KB. Registers: 128 a
// thread where two blocks share a multiprocessor.
#pragma once

#include <algorithm>

#include "cuda/core/early_launch.cuh"
#include "cuda/core/launch.cuh"
#include "cuda/index/products.cuh"
#include "cuda/index/queries.cuh"

namespace dsv4::cuda::index {

constexpr int kWarpgroups = 2;
constexpr int kScoreThreads = 128 * kWarpgroups;
constexpr int kPageKeys = 32;

// What a block does: kGroup tokens at a time, and what a stage holds for a warp's tiles of 16 keys. Whole pages come by
// one copy each; half pages, two copies each, spread few keys over more warps.
template <int kGroup_, int kStages_, bool kWholePages_>
struct Shape {
  static constexpr int kGroup = kGroup_, kStages = kStages_;
  static constexpr bool kWholePages = kWholePages_;
  static constexpr int kTiles = kWholePages ? 2 : 1;     // of a stage
  static constexpr int kStageKeys = kTiles * kWarpKeys;  // of a warp
  static constexpr int kUnitKeys = 4 * kStageKeys;       // of a warpgroup's four stages, the unit that is shared out
};

// Each warp has a ring of kStages stages of its own, keys and their scales, which the copy engine fills.
template <class Keys, class S>
struct Shared {
  static constexpr int kGroup = S::kGroup, kStages = S::kStages;
  static constexpr int kStageBytes = S::kStageKeys * (Keys::kRowBytes + Keys::kScaleBytes);
  alignas(1024) uint8_t queries[kGroup][kQueryBytes<Keys>];
  float4 weights[kGroup][16];  // of heads, as lanes read them
  alignas(128) uint8_t stages[kWarpgroups * 4][kStages][kStageBytes];
  uint64_t full[kWarpgroups * 4][kStages];
  uint64_t queries_full;
  float raw_weights[64];
};

// A token's head weights where the sum over heads wants them, by one warp. Half of them where the sum takes ReLU twice.
template <class Keys>
__device__ __forceinline__ void put_weights(float4 (&to)[16], const float* weights, int lane) {
  // Quad 4 q + c has the heads 16 q + 2 c, + 1, + 8 and + 9.
  constexpr float kFactor = Keys::kPlain ? 1.0f : 0.5f;
  const float2 two = make_float2(kFactor * weights[2 * lane], kFactor * weights[2 * lane + 1]);
  reinterpret_cast<float2*>(&to[lane / 8 * 4 + lane % 4])[lane / 4 % 2] = two;
}

// This lane's part of the sums over heads of a warp's keys row and row + 8, from their products with the queries.
template <class Keys>
__device__ __forceinline__ void weigh(float (&sums)[2], const float (&acc)[32], const float4 (&weights)[16],
                                      int column) {
  sums[0] = 0.0f, sums[1] = 0.0f;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float4 four = weights[4 * q + column];
    const float of_heads[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = acc[8 * q + i];
      // A NaN stays one. Twice the ReLU is cheaper, but not for keys of any size, whose sums may be infinite.
      const float relu = Keys::kPlain ? (x < 0.0f ? 0.0f : x) : x + fabsf(x);
      sums[i / 2 % 2] = fmaf(of_heads[i / 4 * 2 + i % 2], relu, sums[i / 2 % 2]);
    }
  }
}

// The sum of the four lanes of a row: of key row in an even column, of key row + 8 in an odd one.
__device__ __forceinline__ float sum_row(const float (&sums)[2], int column) {
  const float sum =
      (column % 2 == 0 ? sums[0] : sums[1]) + __shfl_xor_sync(kAll, column % 2 == 0 ? sums[1] : sums[0], 1);
  return sum + __shfl_xor_sync(kAll, sum, 2);
}

// A block scores a share of the keys of kGroup neighbouring tokens: grid (shares, groups).
template <class Keys, class S, int kBlocks>
__global__ void __launch_bounds__(kScoreThreads, kBlocks)
    score_kernel(const __grid_constant__ IndexTopkParams params, int first_token, int end_token) {
  constexpr int kGroup = S::kGroup, kStages = S::kStages, kTiles = S::kTiles;
  constexpr bool kPrepared = kGroup > 1;
  let_next_begin();  // the choice, which waits for what is scored here
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<Shared<Keys, S>*>(raw_shared);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAll, threadIdx.x / 32, 0),
            group = first_token + blockIdx.y * kGroup;
  const int warpgroup = warp / 4, column = lane % 4, row = lane / 4;
  [[maybe_unused]] const auto* prepared = reinterpret_cast<const Prepared<Keys>*>(params.prepared);
  // On their way while pages are looked up.
  [[maybe_unused]] RawQuery<kScoreThreads> raw_query;
  if constexpr (!kPrepared) raw_query = load_query<kScoreThreads>(params, group);
  const int64_t layer = __ldg(params.layer);
  const int pages = layer >= 0 && layer < params.pool.layers ? static_cast<int>(params.pool.pages) : 0;
  const uint8_t* const keys_of_layer =
      params.pool.data + (pages > 0 ? layer : 0) * params.pool.pages * params.pool.page_bytes;
  const auto page_bytes = static_cast<uint32_t>(params.pool.page_bytes);
  const int32_t* const token_slot = params.plan.token_slot();
  const int shares = gridDim.x * kWarpgroups, share = blockIdx.x * kWarpgroups + warpgroup;
  uint64_t* const full = shared.full[warp];
  if (lane == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(shared_address(full + i), 1);
    if (threadIdx.x == 0) init_barrier(shared_address(&shared.queries_full), 1);
    fence_barrier_init();
  }
  __syncwarp();
  int used = 0;  // stages so far
  unsigned queries_parity = 0;

  for (int begin = 0; begin < kGroup && group + begin < end_token;) {
    // A run of tokens of one request.
    const int first = group + begin;
    const int slot = token_slot[first];
    int entries = entries_seen(params, first), count = 1;
    if constexpr (kGroup > 1) {
      while (begin + count < kGroup && first + count < end_token && token_slot[first + count] == slot) {
        entries = max(entries, entries_seen(params, first + count));
        ++count;
      }
    }
    begin += count;
    if (entries == 0 || !needs_scores(params, entries)) continue;
    const int units = (entries + S::kUnitKeys - 1) / S::kUnitKeys;
    if (static_cast<int>(blockIdx.x) * kWarpgroups >= units) continue;

    const int32_t* blocks = params.table.data + static_cast<int64_t>(slot) * params.table.max_blocks;
    const int mine = share < units ? (units - share + shares - 1) / shares : 0;  // units of this warpgroup
    // A lane holds the block of one of 32 units ahead.
    const auto look_up = [&](int from) {
      const int unit = share + (from + lane) * shares,
                page = S::kWholePages ? 4 * unit + warp % 4 : 2 * unit + warp % 4 / 2;
      const int block = from + lane < mine && page < params.table.max_blocks ? __ldg(blocks + page) : -1;
      return block >= 0 && block < pages ? block : -1;
    };
    int ahead = look_up(0), ahead_from = 0;
    unsigned missing_ring = 0;  // bit i: stage i holds no keys
    const auto fill = [&](int i) {
      if (i >= mine) return;
      if (i - ahead_from == 32) ahead = look_up(i), ahead_from = i;
      const int block = __shfl_sync(kAll, ahead, i - ahead_from), stage = (used + i) % kStages;
      missing_ring = (missing_ring & ~(1u << stage)) | static_cast<unsigned>(block < 0) << stage;
      if (lane == 0) {
        const uint8_t* page = keys_of_layer + static_cast<uint64_t>(static_cast<uint32_t>(max(block, 0))) * page_bytes;
        uint8_t* to = shared.stages[warp][stage];
        constexpr int kData = S::kStageKeys * Keys::kRowBytes, kScales = S::kStageKeys * Keys::kScaleBytes;
        expect_bytes(full + stage, kData + kScales);
        if constexpr (S::kWholePages) {
          copy_bulk(to, page, kData + kScales, full + stage);
        } else {
          copy_bulk(to, page + warp % 2 * kData, kData, full + stage);
          if constexpr (kScales > 0) {
            copy_bulk(to + kData, page + kPageKeys * Keys::kRowBytes + warp % 2 * kScales, kScales, full + stage);
          }
        }
      }
    };
    for (int i = 0; i < kStages; ++i) fill(i);

    if constexpr (kPrepared) {
      __syncthreads();  // before the queries of the run before are replaced
      if (threadIdx.x == 0) {
        expect_bytes(&shared.queries_full, count * kQueryBytes<Keys>);
        for (int i = 0; i < count; ++i) {
          copy_bulk(shared.queries[i], prepared[first + i - first_token].queries, kQueryBytes<Keys>,
                    &shared.queries_full);
        }
      }
      for (int i = warp; i < count; i += kWarpgroups * 4) {
        put_weights<Keys>(shared.weights[i], prepared[first + i - first_token].weights, lane);
      }
      fence_async();
      __syncthreads();
      wait(shared_address(&shared.queries_full), queries_parity);
      queries_parity ^= 1u;
    } else {
      __syncthreads();
      prepare<Keys, kScoreThreads>(params, raw_query, shared.queries[0], shared.raw_weights);
      __syncthreads();
      if (warp == 0) put_weights<Keys>(shared.weights[0], shared.raw_weights, lane);
      fence_async();
      __syncthreads();
    }

    // A tile is part `part` of the warp's unit `unit`. A lane has the scale of the key whose score it stores.
    struct Read {
      typename Keys::Tile keys;
      float scale;
    };
    const auto read = [&](int unit, int part) {
      const int turn = used + unit, stage = turn % kStages;
      if (part == 0) wait(shared_address(full + stage), turn / kStages & 1);
      typename Keys::Raw raw;
      Keys::template load<S::kStageKeys>(raw, shared.stages[warp][stage], part * kWarpKeys + row, column,
                                         params.pool.global_scale);
      const typename Keys::Tile tile(raw, column, params.pool.global_scale);
      const bool missing = (missing_ring >> stage & 1u) != 0u;
      return Read{tile, missing ? __int_as_float(0x7FC00000) : tile.scale(column % 2)};
    };
    // Fills the stage of a unit again once products with its last tile have begun: all lanes have what they read.
    const auto refill = [&](int unit) {
      __syncwarp();
      fill(unit + kStages);
    };
    // Of the lane's key in the first tile of all. Not to be worked out again for each tile, if registers suffice.
    float* scores_of_lane = params.every_score + (first - first_token) * params.capacity +
                            (warp % 4 * S::kStageKeys + row + 8 * (column % 2));
    if constexpr (kGroup == 1) asm volatile("" : "+l"(scores_of_lane));
    float acc[32];
    // Starts the products of a tile with a token's queries.
    const auto start = [&](const Read& tile, int token) {
      const uint64_t queries = descriptor(shared_address(shared.queries[token]));
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int step = 0; step < Keys::kSteps; ++step) {
        uint32_t a[4];
        tile.keys.words(step, a);
        multiply<Keys>(acc, a, queries + (step / 4 * 8192 + step % 4 * 32) / 16, step > 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    // Waits for the products of a tile with a token, starts the next ones and stores the sums over heads.
    const auto finish = [&](const Read& tile, int unit, int part, int token, const Read& next, int next_token) {
      await_products(acc);
      float sums[2];
      weigh<Keys>(sums, acc, shared.weights[token], column);
      start(next, next_token);
      const float sum = sum_row(sums, column);
      if (column < 2) {
        const int from = (share + unit * shares) * S::kUnitKeys + part * kWarpKeys;
        __stcg(scores_of_lane + token * params.capacity + from, sum * tile.scale);
      }
    };
    // A tile with each token, while the tile behind it is read.
    const auto score_tile = [&](const Read& tile, Read& next, int unit, int part) {
      if constexpr (kGroup > 1) {
#pragma unroll 1
        for (int token = 0; token < count - 1; ++token) finish(tile, unit, part, token, tile, token + 1);
      }
      const bool last = part == kTiles - 1;  // of its unit
      const int next_unit = last ? unit + 1 : unit, next_part = last ? 0 : part + 1;
      const bool more = !last || next_unit < mine;
      if (more) next = read(next_unit, next_part);
      // Behind the last tile its products are those of an old one, for nobody.
      finish(tile, unit, part, count - 1, next, 0);
      if (more && next_part == kTiles - 1) refill(next_unit);
    };
    if (mine > 0) {
      Read one = read(0, 0), other = one;
      start(one, 0);
      if constexpr (kTiles == 1) refill(0);
#pragma unroll 1
      for (int unit = 0; unit < mine; unit += 2 / kTiles) {
        score_tile(one, other, unit, 0);
        if constexpr (kTiles == 2) {
          score_tile(other, one, unit, 1);
        } else if (unit + 1 < mine) {
          score_tile(other, one, unit + 1, 0);
        }
      }
      await_products(acc);
    }
    used += mine;
  }
}

// Scores of tokens first .. end - 1 into the slab. Queries are prepared first where a step brings several tokens of a
// request, which then share the keys that a block reads.
template <class Keys>
cudaError_t launch_score(cudaStream_t stream, const IndexTopkParams& params, int first, int end) {
  constexpr bool kLargeRows = Keys::kRowBytes > 128;  // bf16: a block a multiprocessor
  constexpr int kStages = Keys::kRowBytes == 64 ? 4 : 2, kBlocks = kLargeRows ? 1 : 2;
  const int tokens = end - first, places = kBlocks * static_cast<int>(multiprocessors());
  const auto run = [&](auto shape, int shares) {
    using S = decltype(shape);
    const auto kernel = score_kernel<Keys, S, kBlocks>;
    constexpr int kShared = sizeof(Shared<Keys, S>);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    const int most = static_cast<int>(blocks_for(params.capacity, S::kUnitKeys * kWarpgroups));
    const dim3 grid(std::clamp(shares, 1, most), blocks_for(tokens, S::kGroup));
    kernel<<<grid, kScoreThreads, kShared, stream>>>(params, first, end);
    return cudaGetLastError();
  };
  if (params.prepared == nullptr) {
    const int64_t units = tokens * (params.capacity / Shape<1, kStages, true>::kUnitKeys);
    if (units < 8 * places * kWarpgroups) return run(Shape<1, kStages, false>{}, places / tokens);
    return run(Shape<1, kStages, true>{}, places / tokens);
  }
  // As many tokens as leave room for two blocks.
  using Grouped = Shape<Keys::kBytes == 1 ? 8 : 4, Keys::kRowBytes == 128 ? 1 : 2, true>;
  prepare_kernel<Keys><<<tokens, kPrepareThreads, 0, stream>>>(params, first);
  const int groups = static_cast<int>(blocks_for(tokens, Grouped::kGroup));
  // Four whole waves of blocks, for tokens differ in what they see; but no block prepares for next to nothing.
  const int units = static_cast<int>(params.capacity) / Grouped::kUnitKeys, worthwhile = units / (4 * kWarpgroups);
  return run(Grouped{}, std::min(4 * places / groups, worthwhile));
}

}  // namespace dsv4::cuda::index
