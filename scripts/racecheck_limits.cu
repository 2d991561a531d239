// What compute-sanitizer's racecheck takes for races and is none: two ways of attention's kernel to order accesses to
// shared memory, each by itself. Behind them lie the records that racecheck has of attend_kernel.
//
//   nvcc -arch=sm_90a -o build/limits scripts/racecheck_limits.cu
//   compute-sanitizer --tool racecheck build/limits MODE
//
// MODE one: lanes of a warp write, meet at __syncwarp, and one of them arrives at an mbarrier for all (a record);
//      all: every lane arrives (none);
//      cluster: a warp writes, and another one writes the same place behind the cluster's barrier.

#include <cstdint>
#include <cstdio>
#include <cstring>

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__global__ void by_mbarrier(int* out, bool all) {
  __shared__ int numbers[32];
  __shared__ __align__(8) uint64_t barrier;
  const uint32_t written = shared_address(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(written), "r"(all ? 32 : 1) : "memory");
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    numbers[lane] = lane;
    __syncwarp();
    if (all || lane == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(written) : "memory");
    return;
  }
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(written), "r"(0)
                 : "memory");
  }
  out[lane] = numbers[lane ^ 1];
}

__global__ void by_cluster_barrier(int* out) {
  __shared__ int numbers[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) numbers[lane] = lane;
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x < 32) return;
  numbers[lane ^ 1] = -lane;
  out[lane] = numbers[lane ^ 1];
}

int main(int arguments, char** words) {
  if (arguments != 2) return 2;
  int* out = nullptr;
  cudaMalloc(&out, 32 * sizeof(int));
  if (strcmp(words[1], "cluster") == 0) {
    by_cluster_barrier<<<1, 64>>>(out);
  } else {
    by_mbarrier<<<1, 64>>>(out, strcmp(words[1], "all") == 0);
  }
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
