// A block's shared memory on Hopper: what lies where.
#pragma once

#include "cuda/attend/barriers.cuh"
#include "cuda/attend/rows.cuh"

namespace dsv4::cuda::attention {

constexpr int kTileHeads = kAttendedHeads;
constexpr int kStages = 2;  // decoded tiles
constexpr int kAhead = 4;   // tiles whose rows are known
constexpr int kLargestCluster = 16;
constexpr float kLog2E = 1.4426950408889634f;

// What is known of each key of a tile: what is added to its logit (0 or -inf); what its logit (for exp2) and its weight
// are multiplied by; and what logits and weights are multiplied by besides for channels that its scale does not cover.
enum Fact { kExists, kLogitFactor, kWeightFactor, kTailFactor, kFactsOfKey };

// By the 1024-byte aligned address where it begins.
struct Shared {
  uint32_t start;

  static constexpr int kRows = 8 * kTileBytes;  // 64 rows of 512 channels
  static constexpr int kTiles = kRows;
  static constexpr int kWeights = kTiles + kStages * kRows;
  static constexpr int kFacts = kWeights + kStages * kTileBytes;
  static constexpr int kSources = kFacts + kAhead * kFactsOfKey * kTileRows * 4;
  static constexpr int kShrink = kSources + kAhead * kTileRows * 16;
  static constexpr int kShares = kShrink + kStages * kTileHeads * 4;
  static constexpr int kBarriers = kShares + kLargestCluster * kTileHeads * 8;
  static constexpr int kBytes = kBarriers + (3 * kStages + 3 * kAhead) * 8 + kSwizzleBytes;  // with room to align
  static_assert(kBytes <= 227 * 1024);

  template <class T>
  __device__ __forceinline__ static T* pointer(uint32_t address) {
    return static_cast<T*>(__cvta_shared_to_generic(address));
  }

  __device__ __forceinline__ uint32_t queries() const { return start; }
  // Of a tile, by its number in the block: a ring of kStages or of kAhead.
  __device__ __forceinline__ uint32_t tiles(int tile) const { return start + kTiles + tile % kStages * kRows; }
  __device__ __forceinline__ uint32_t weights(int tile) const { return start + kWeights + tile % kStages * kTileBytes; }
  // [64 heads]: what sums so far are multiplied by before the tile's are added.
  __device__ __forceinline__ float* shrink(int tile) const {
    return pointer<float>(start + kShrink + tile % kStages * kTileHeads * 4);
  }
  // [64 keys]
  __device__ __forceinline__ float* facts(int tile, Fact fact) const {
    return pointer<float>(start + kFacts + (tile % kAhead * kFactsOfKey + fact) * kTileRows * 4);
  }
  __device__ __forceinline__ uint4* source(int tile, int key) const {
    return pointer<uint4>(start + kSources + (tile % kAhead * kTileRows + key) * 16);
  }
  __device__ __forceinline__ void put_row(int tile, int key, const RowSource& row) const {
    const auto address = reinterpret_cast<unsigned long long>(row.data);
    *source(tile, key) =
        uint4{static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32), row.scale.x, row.scale.y};
  }
  __device__ __forceinline__ RowSource row(int tile, int key) const {
    const uint4 source_of_key = *source(tile, key);
    const auto address = static_cast<unsigned long long>(source_of_key.y) << 32 | source_of_key.x;
    return {reinterpret_cast<const uint8_t*>(address), {source_of_key.z, source_of_key.w}};
  }
  // [blocks, 64 heads] (maximum, sum): every block's part of the softmax.
  __device__ __forceinline__ uint32_t share_at(int block, int head) const {
    return start + kShares + (block * kTileHeads + head) * 8;
  }
  __device__ __forceinline__ float2* share(int block, int head) const { return pointer<float2>(share_at(block, head)); }
  // Barriers. A tile is decoded; its weights are there for warpgroup 1; it is done with them; its rows are known, and
  // what they are multiplied by; both sums are done with the tile.
  __device__ __forceinline__ uint32_t barrier(int i) const { return start + kBarriers + 8 * i; }
  __device__ __forceinline__ uint32_t full(int tile) const { return barrier(tile % kStages); }
  __device__ __forceinline__ uint32_t weighed(int tile) const { return barrier(kStages + tile % kStages); }
  __device__ __forceinline__ uint32_t summed(int tile) const { return barrier(2 * kStages + tile % kStages); }
  __device__ __forceinline__ uint32_t known(int tile) const { return barrier(3 * kStages + tile % kAhead); }
  __device__ __forceinline__ uint32_t described(int tile) const {
    return barrier(3 * kStages + kAhead + tile % kAhead);
  }
  __device__ __forceinline__ uint32_t empty(int tile) const {
    return barrier(3 * kStages + 2 * kAhead + tile % kAhead);
  }

  __device__ __forceinline__ void init_barriers(int scouts, int decoders) const {
    for (int tile = 0; tile < kStages; ++tile) {
      init_barrier(full(tile), decoders);
      init_barrier(weighed(tile), 4);
      init_barrier(summed(tile), 4);
    }
    for (int tile = 0; tile < kAhead; ++tile) {
      init_barrier(known(tile), scouts);
      init_barrier(described(tile), scouts);
      init_barrier(empty(tile), 8);
    }
    fence_barrier_init();
  }
};

// Waits until both sums are done with the tile `ago` tiles before this one.
__device__ __forceinline__ void wait_for_consumers(const Shared& shared, int tile, int ago) {
  if (tile >= ago) wait(shared.empty(tile - ago), (tile - ago) / kAhead % 2);
}

}  // namespace dsv4::cuda::attention
