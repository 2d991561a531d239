// A block's shared memory on Hopper: what lies where.
#pragma once

#include "cuda/attend/barriers.cuh"
#include "cuda/attend/rows.cuh"

namespace dsv4::cuda::attention {

constexpr int kTileHeads = 64;
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
  static constexpr int kWeights = kTiles + 2 * kRows;
  static constexpr int kFacts = kWeights + 2 * kTileBytes;
  static constexpr int kShrink = kFacts + 2 * kFactsOfKey * kTileRows * 4;
  static constexpr int kShares = kShrink + 2 * kTileHeads * 4;
  static constexpr int kBarriers = kShares + kLargestCluster * kTileHeads * 8;
  static constexpr int kBytes = kBarriers + 8 * 8 + kSwizzleBytes;  // with room to align

  template <class T>
  __device__ __forceinline__ static T* pointer(uint32_t address) {
    return static_cast<T*>(__cvta_shared_to_generic(address));
  }

  __device__ __forceinline__ uint32_t queries() const { return start; }
  __device__ __forceinline__ uint32_t tiles(int stage) const { return start + kTiles + stage * kRows; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return start + kWeights + stage * kTileBytes; }
  // [64 keys]
  __device__ __forceinline__ float* facts(int stage, Fact fact) const {
    return pointer<float>(start + kFacts + (stage * kFactsOfKey + fact) * kTileRows * 4);
  }
  // [64 heads]: what sums so far are multiplied by before the tile's are added.
  __device__ __forceinline__ float* shrink(int stage) const {
    return pointer<float>(start + kShrink + stage * kTileHeads * 4);
  }
  // [blocks, 64 heads] (maximum, sum): every block's part of the softmax.
  __device__ __forceinline__ uint32_t share(int rank, int head) const {
    return start + kShares + (rank * kTileHeads + head) * 8;
  }
  // At the end: the sums of other blocks, where the tiles were, and this block's part of the output, where the queries
  // were (and beyond, if no block sends anything).
  __device__ __forceinline__ uint32_t parts() const { return start + kTiles; }
  __device__ __forceinline__ uint32_t output() const { return start; }

  __device__ __forceinline__ uint32_t full(int stage) const { return start + kBarriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return start + kBarriers + 16 + 8 * stage; }
  __device__ __forceinline__ uint32_t weighed(int stage) const { return start + kBarriers + 32 + 8 * stage; }
  __device__ __forceinline__ uint32_t summed(int stage) const { return start + kBarriers + 48 + 8 * stage; }

  __device__ __forceinline__ void init_barriers(int producing_warps) const {
    for (int stage = 0; stage < 2; ++stage) {
      init_barrier(full(stage), producing_warps);
      init_barrier(empty(stage), 8);
      init_barrier(weighed(stage), 4);
      init_barrier(summed(stage), 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

}  // namespace dsv4::cuda::attention
