// Rows of this step on their way into shared memory, to be pooled when they are there. A warp copies the channels that
// it will pool, so that it waits for no other; and registers are left to what is being pooled meanwhile.
#pragma once

#include "cuda/close/window.cuh"

namespace dsv4::cuda {

// Begins a copy. kShared: through the L1 cache, for what other warps of the multiprocessor read too.
template <bool kShared>
__device__ __forceinline__ void copy_async(unsigned shared, const void* from) {
  if constexpr (kShared) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  }
}

// Closes a group of copies: `wait_copies` waits for them, and not for loads that come behind.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
}

// Where the eight rows that a CSA window pools land, 128 channels of them: kv, then gates. Behind them the rows of the
// position bias and the norm weights, which stay: loads for each window would have to wait behind copies that other
// warps have begun, and registers are too few.
template <int W, class T>
struct Landing {
  static constexpr int kColumns = 2 * W;
  static constexpr int kLaneBytes = 16;
  static constexpr int kRowBytes = kQuadChannels * static_cast<int>(sizeof(T));
  static constexpr int kRowsAtOnce = kWarp * kLaneBytes / kRowBytes;
  static constexpr int kBiasRowBytes = kQuadChannels * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kGroupRows * (2 * kRowBytes + kBiasRowBytes) + kBiasRowBytes;

  char* rows;
  int channel;  // the warp's first
  int lane;

  // Where row i's half of a token's columns begins: the window before is pooled by its overlap halves.
  __device__ __forceinline__ static constexpr int half(int i) { return i < kCsaRatio ? 0 : W; }

  // Begins copying the rows of the position bias, and the weights.
  __device__ __forceinline__ void copy_constants(const Projections& in, const float* norm_weight) const {
    const unsigned to = shared(bias()) + lane * kLaneBytes;
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      copy_async<true>(to + i * kBiasRowBytes,
                       in.position_bias + i % kCsaRatio * kColumns + half(i) + channel + channel_of(0, lane));
    }
    copy_async<true>(to + kGroupRows * kBiasRowBytes, norm_weight + channel + channel_of(0, lane));
  }

  // Begins copying the rows of tokens `first` .. `first` + 7.
  __device__ __forceinline__ void copy(const Projections& in, int first) const {
    constexpr int kRowLanes = kWarp / kRowsAtOnce, kLaneChannels = kLaneBytes / static_cast<int>(sizeof(T));
    const int64_t offset =
        static_cast<int64_t>(first + lane / kRowLanes) * kColumns + channel + lane % kRowLanes * kLaneChannels;
    const T* kv = static_cast<const T*>(in.kv) + offset;
    const T* gate = static_cast<const T*>(in.gate) + offset;
    const unsigned to = shared(rows) + lane * kLaneBytes;
#pragma unroll
    for (int i = 0; i < kGroupRows; i += kRowsAtOnce) {
      copy_async<false>(to + i * kRowBytes, kv + i * kColumns + half(i));
      copy_async<false>(to + (kGroupRows + i) * kRowBytes, gate + i * kColumns + half(i));
    }
  }

  // The weights of four channels.
  __device__ __forceinline__ void load_weights(float (&weight)[4]) const {
    load_values(reinterpret_cast<const float*>(bias() + kGroupRows * kBiasRowBytes) + channel_of(0, lane), weight);
  }

  // Pools four channels of what has landed.
  __device__ __forceinline__ Partials<4> pool() const {
    const T* own = reinterpret_cast<const T*>(rows) + channel_of(0, lane);
    const float* own_bias = reinterpret_cast<const float*>(bias()) + channel_of(0, lane);
    float kv[kGroupRows][4], score[kGroupRows][4];
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      load_values(own + i * kQuadChannels, kv[i]);
      load_values(own + (kGroupRows + i) * kQuadChannels, score[i]);
      float position_bias[4];
      load_values(own_bias + i * kQuadChannels, position_bias);
#pragma unroll
      for (int c = 0; c < 4; ++c) score[i][c] += position_bias[c];
    }
    return pool_group(kv, score);
  }

 private:
  __device__ __forceinline__ char* bias() const { return rows + 2 * kGroupRows * kRowBytes; }
  __device__ __forceinline__ static unsigned shared(const char* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
  }
};

}  // namespace dsv4::cuda
