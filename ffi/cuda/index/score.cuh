// Indexer scores on Hopper: I[t, s] = sum over heads of w[t, h] * relu(q[t, h] . K[s]).
//
// Keys are the rows of the product, 16 a warp; they go through shared memory into the registers that wgmma takes its
// first operand from; a token's queries are the columns, in shared memory. The sum over heads is a second product, of
// the relu'd sums as halves with the head weights, and a warp's own: for a warpgroup's, eight columns would take as
// long as 64. For bf16 keys, whose sums may exceed halves, it is fp32 arithmetic.
//
// Threads: two warpgroups; every warp copies and multiplies for itself. Barriers: an mbarrier a stage and one for
// prepared queries; __syncthreads only where queries change. Shared memory: `Shared`, 44 to 200 KB. Registers: 128 a
// thread where two blocks share a multiprocessor.
#pragma once

#include <algorithm>

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
  alignas(16) uint8_t weights[kGroup][1024];  // the second product's operand as lanes read it; bf16: 64 floats
  float weight_scale[kGroup];
  alignas(128) uint8_t stages[kWarpgroups * 4][kStages][kStageBytes];
  uint64_t full[kWarpgroups * 4][kStages];
  uint64_t queries_full;
  float raw_weights[64];
};

// A token's head weights where the sum over heads wants them, by one warp.
template <class Keys>
__device__ __forceinline__ void put_weights(uint8_t* to, float* scale, const float* weights, int lane) {
  if constexpr (Keys::kPlain) {
    reinterpret_cast<float2*>(to)[lane] = make_float2(weights[2 * lane], weights[2 * lane + 1]);
  } else {
    store_weights(to, scale, weights, lane);
  }
}

// The sums over heads of a warp's keys row and row + 8, from what their products with the queries are; in the first of
// the four lanes of a row. For bf16 keys.
__device__ __forceinline__ void sum_floats(float (&sums)[2], const float (&acc)[32], const uint8_t* weights,
                                           int column) {
  const float* of_heads = reinterpret_cast<const float*>(weights) + 2 * column;
  sums[0] = 0.0f, sums[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = acc[4 * j + i];
      sums[i / 2] = fmaf(of_heads[8 * j + i % 2], x < 0.0f ? 0.0f : x, sums[i / 2]);  // a NaN stays one
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sums[0] += __shfl_xor_sync(kAll, sums[0], step), sums[1] += __shfl_xor_sync(kAll, sums[1], step);
  }
}

// For other keys, from those products as halves.
__device__ __forceinline__ void sum_halves(float (&sums)[2], const uint32_t (&halves)[16], const uint8_t* weights,
                                           float scale, int lane) {
  float products[4] = {};
#pragma unroll
  for (int step = 0; step < 4; step += 2) {
    const uint4 of_heads = load16(weights + 512 * (step / 2) + 16 * lane);
    weigh(products, halves[4 * step], halves[4 * step + 1], halves[4 * step + 2], halves[4 * step + 3], of_heads.x,
          of_heads.y);
    weigh(products, halves[4 * step + 4], halves[4 * step + 5], halves[4 * step + 6], halves[4 * step + 7], of_heads.z,
          of_heads.w);
  }
  sums[0] = fmaf(products[1], 1.0f / kRestScale, products[0]) * scale;
  sums[1] = fmaf(products[3], 1.0f / kRestScale, products[2]) * scale;
}

// A block scores a share of the keys of kGroup neighbouring tokens: grid (shares, groups).
template <class Keys, class S, int kBlocks>
__global__ void __launch_bounds__(kScoreThreads, kBlocks)
    score_kernel(const __grid_constant__ IndexTopkParams params, int first_token, int end_token) {
  constexpr int kGroup = S::kGroup, kStages = S::kStages, kTiles = S::kTiles;
  constexpr bool kPrepared = kGroup > 1;
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
  const int32_t* const token_slot = params.plan.token_slot();
  const int shares = gridDim.x * kWarpgroups, share = blockIdx.x * kWarpgroups + warpgroup;
  uint64_t* const full = shared.full[warp];
  if (lane == 0) {
    for (int i = 0; i < kStages; ++i) init_barrier(full + i);
    if (threadIdx.x == 0) init_barrier(&shared.queries_full);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  int filled = 0, used = 0;  // stages so far
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
      const int block = __shfl_sync(kAll, ahead, i - ahead_from), stage = filled % kStages;
      missing_ring = (missing_ring & ~(1u << stage)) | static_cast<unsigned>(block < 0) << stage;
      if (lane == 0) {
        const uint8_t* page = keys_of_layer + static_cast<int64_t>(max(block, 0)) * params.pool.page_bytes;
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
      ++filled;
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
        put_weights<Keys>(shared.weights[i], &shared.weight_scale[i], prepared[first + i - first_token].weights, lane);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      wait_barrier(&shared.queries_full, queries_parity);
      queries_parity ^= 1u;
    } else {
      __syncthreads();
      prepare<Keys, kScoreThreads>(params, raw_query, shared.queries[0], shared.raw_weights);
      __syncthreads();
      if (warp == 0) put_weights<Keys>(shared.weights[0], &shared.weight_scale[0], shared.raw_weights, lane);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
    }

    // Tile i: the keys `i % kTiles` of the warp's unit i / kTiles.
    struct Read {
      typename Keys::Tile keys;
      bool missing;
    };
    const auto read = [&](int i) {
      const int unit = used + i / kTiles, stage = unit % kStages;
      wait_barrier(full + stage, unit / kStages & 1);
      typename Keys::Raw raw;
      Keys::template load<S::kStageKeys>(raw, shared.stages[warp][stage], i % kTiles * kWarpKeys + row, column,
                                         params.pool.global_scale);
      return Read{typename Keys::Tile(raw, column, params.pool.global_scale), (missing_ring >> stage & 1u) != 0u};
    };
    // Fills the stage of tile i again, if nothing else is in it, once products with the tile have begun: all lanes have
    // what they read.
    const auto refill = [&](int i) {
      if (i % kTiles == kTiles - 1) {
        __syncwarp();
        fill(i / kTiles + kStages);
      }
    };
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
    const auto finish = [&](const Read& tile, int i, int token, const Read& next, int next_token) {
      await_products(acc);
      float sums[2];
      const uint8_t* const weights = shared.weights[token];
      if constexpr (Keys::kPlain) {
        sum_floats(sums, acc, weights, column);
        start(next, next_token);
      } else {
        uint32_t halves[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) halves[j] = relu_halves(acc[2 * j], acc[2 * j + 1]);
        // At once if there are registers for it.
        constexpr bool kEarly = Keys::kBytes == 1;
        if constexpr (kEarly) start(next, next_token);
        sum_halves(sums, halves, weights, shared.weight_scale[token], lane);
        if constexpr (!kEarly) start(next, next_token);
      }
      if (column == 0) {
        const int unit = share + i / kTiles * shares;
        const int key = unit * S::kUnitKeys + warp % 4 * S::kStageKeys + i % kTiles * kWarpKeys + row;
        float* to = params.every_score + (static_cast<int64_t>(first + token - first_token) * params.capacity + key);
        to[0] = tile.missing ? __int_as_float(0x7FC00000) : sums[0] * tile.keys.scale(0);
        to[8] = tile.missing ? __int_as_float(0x7FC00000) : sums[1] * tile.keys.scale(1);
      }
    };
    // Tile i with each token, while the tile behind it is read.
    const auto score_tile = [&](const Read& tile, Read& next, int i) {
      if constexpr (kGroup > 1) {
#pragma unroll 1
        for (int token = 0; token < count - 1; ++token) finish(tile, i, token, tile, token + 1);
      }
      if (i + 1 < mine * kTiles) next = read(i + 1);
      finish(tile, i, count - 1, next, 0);  // behind the last tile its products are those of an old one, for nobody
      if (i + 1 < mine * kTiles) refill(i + 1);
    };
    if (mine > 0) {
      Read one = read(0), other = one;
      start(one, 0);
      refill(0);
#pragma unroll 1
      for (int i = 0; i < mine * kTiles; i += 2) {
        score_tile(one, other, i);
        if (i + 1 < mine * kTiles) score_tile(other, one, i + 1);
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
  // Several waves of blocks, for tokens differ in what they see; but no block prepares for next to nothing.
  const int units = static_cast<int>(params.capacity) / Grouped::kUnitKeys, worthwhile = units / (4 * kWarpgroups);
  return run(Grouped{}, std::min<int>(blocks_for(8 * places, groups), worthwhile));
}

}  // namespace dsv4::cuda::index
