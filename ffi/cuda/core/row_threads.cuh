// The threads that share a row, a few neighbouring channels each. Reductions over them follow the balanced tree of
// ffi/math/pooling.h, however many channels a thread has.
#pragma once

#include "cuda/core/barriers.cuh"
#include "cuda/core/warp_rows.cuh"

namespace dsv4::cuda {

// N neighbouring channels a thread, which `thread` counts from 0 within the row.
template <int W, int N = 4>
struct RowThreads {
  static constexpr int kThreads = W / N;
  static constexpr int kWarps = kThreads / kWarp;
  int thread;
  Barrier barrier;
  float* scratch;  // shared memory, 2 * kWarps floats; unused by single-warp rows

  __device__ __forceinline__ int channel() const { return N * thread; }

  // The same threads, as if counted anew: what follows from the count is computed behind this, and takes no registers
  // from what stands before a branch to it.
  __device__ __forceinline__ RowThreads again() const {
    RowThreads same = *this;
    asm volatile("" : "+r"(same.thread));
    return same;
  }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      sync_threads(barrier, kThreads);
    }
  }

  __device__ __forceinline__ float sum(float leaf) const {
    return over_warps(scratch, sum_over_lanes(leaf), [](float a, float b) { return a + b; });
  }

  // Of values that are not below 0.
  __device__ __forceinline__ float max(float value) const {
    return over_warps(scratch + kWarps, max_over_lanes<kWarp>(value), max_ignoring_nan);
  }

 private:
  // A balanced tree over the warps.
  template <class Merge>
  __device__ __forceinline__ float over_warps(float* of_warps, float of_warp, Merge&& merge) const {
    if constexpr (kWarps == 1) return of_warp;
    if (thread % kWarp == 0) of_warps[static_cast<unsigned>(thread) / kWarp] = of_warp;
    sync();
    float values[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) values[i] = of_warps[i];
#pragma unroll
    for (int step = 1; step < kWarps; step *= 2) {
#pragma unroll
      for (int i = 0; i < kWarps; i += 2 * step) values[i] = merge(values[i], values[i + step]);
    }
    return values[0];
  }
};

constexpr int kRowThreads = RowThreads<kHeadDim>::kThreads;

}  // namespace dsv4::cuda
