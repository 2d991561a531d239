// Barriers by name: those within a block, and those of a cluster of blocks.
#pragma once

#include <cooperative_groups.h>

namespace dsv4::cuda {

// Named barriers of a block, one for each group of threads that waits for its own alone. `__syncthreads` has barrier 0.
enum class Barrier : int {
  kNone = 0,  // of a row that one warp has
  kWindowRow = 1,
  kEntryRow = 2,
  kKeyRow = 3,
};

// Waits for `threads` threads of the block that name the same barrier.
__device__ __forceinline__ void sync_threads(Barrier barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(threads) : "memory");
}

// Clusters: blocks that write each other's shared memory, from compute capability 9.0 on. Code for older ones is
// compiled without, and never launched with more than one block to a cluster (see `has_clusters` in launch.cuh).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DSV4_CLUSTER_DIMS(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define DSV4_CLUSTER_DIMS(blocks)
#endif

template <int kBlocks>
struct ClusterBarrier {
  // Whether a kernel with clusters of so many blocks has code for this architecture.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kCompiled = true;
#else
  static constexpr bool kCompiled = kBlocks == 1;
#endif

  // Tells the cluster that this block runs, so that its shared memory may be written; `wait` waits until all do.
  // Relaxed and without a clobber, because it publishes nothing: before its first arrival a block has written nothing
  // that others read, and later ones come after the reads of what others wrote, whose values went through the barrier
  // of the row (RowThreads::sum), a volatile statement that does clobber memory.
  __device__ __forceinline__ static void begin() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
  }

  __device__ __forceinline__ static void wait() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }

  // Tells the cluster that this thread reads no more of what others have; `wait` waits until none does.
  __device__ __forceinline__ static void leave() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }

  // Waits for all threads of the cluster, and makes what they wrote known to each other.
  __device__ __forceinline__ static void sync() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      cooperative_groups::this_cluster().sync();
#endif
    }
  }

  // The same variable of the cluster's first block.
  template <class T>
  __device__ __forceinline__ static T* of_first_block(T* own) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) return cooperative_groups::this_cluster().map_shared_rank(own, 0);
#endif
    return own;
  }
};

}  // namespace dsv4::cuda
