// Rows of this step on their way into shared memory, to be pooled when they are there. A warp copies the channels that
// it will pool, so that it waits for no other; and registers are left to what is being pooled meanwhile.
#pragma once

#include "window.cuh"

namespace dsv4::cuda {

__device__ __forceinline__ void copy_async(unsigned shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

// Waits until no copies of this warp are on their way.
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// Where the eight rows that a CSA window pools land, 128 channels of them: kv, then gates.
template <int W, class T>
struct Landing {
  static constexpr int kColumns = 2 * W;
  static constexpr int kLaneBytes = 16;
  static constexpr int kRowBytes = kQuadChannels * static_cast<int>(sizeof(T));
  static constexpr int kRowsAtOnce = kWarp * kLaneBytes / kRowBytes;
  static constexpr int kBytes = 2 * kGroupRows * kRowBytes;

  char* rows;

  // Where row i's half of a token's columns begins: the window before is pooled by its overlap halves.
  __device__ __forceinline__ static constexpr int half(int i) { return i < kCsaRatio ? 0 : W; }

  // Begins copying the rows of tokens `first` .. `first` + 7, `channel` being the warp's first.
  __device__ __forceinline__ void copy(const Projections& in, int first, int channel, int lane) const {
    constexpr int kRowLanes = kWarp / kRowsAtOnce, kLaneChannels = kLaneBytes / static_cast<int>(sizeof(T));
    const int64_t offset =
        static_cast<int64_t>(first + lane / kRowLanes) * kColumns + channel + lane % kRowLanes * kLaneChannels;
    const T* kv = static_cast<const T*>(in.kv) + offset;
    const T* gate = static_cast<const T*>(in.gate) + offset;
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(rows)) + lane * kLaneBytes;
#pragma unroll
    for (int i = 0; i < kGroupRows; i += kRowsAtOnce) {
      copy_async(to + i * kRowBytes, kv + i * kColumns + half(i));
      copy_async(to + (kGroupRows + i) * kRowBytes, gate + i * kColumns + half(i));
    }
  }

  // Pools four channels of what has landed, `bias` being ape's rows.
  __device__ __forceinline__ Partials<4> pool(const float (&bias)[kGroupRows][4], int lane) const {
    const T* own = reinterpret_cast<const T*>(rows) + 4 * lane;
    float kv[kGroupRows][4], score[kGroupRows][4];
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      load_values(own + i * kQuadChannels, kv[i]);
      load_values(own + (kGroupRows + i) * kQuadChannels, score[i]);
#pragma unroll
      for (int c = 0; c < 4; ++c) score[i][c] += bias[i][c];
    }
    return pool_group(kv, score);
  }

  __device__ __forceinline__ static void load_bias(const Projections& in, int channel, float (&bias)[kGroupRows][4]) {
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      load_values(in.ape + i % kCsaRatio * kColumns + half(i) + channel, bias[i]);
    }
  }
};

}  // namespace dsv4::cuda
