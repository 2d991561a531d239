// What compute-sanitizer's racecheck takes for races and is none: two ways of attention's kernel to order accesses to
// shared memory, each by itself. Behind them lie the records that racecheck has of attend_kernel.
//
//   nvcc -arch=sm_90a -o build/limits scripts/racecheck_limits.cu
//   compute-sanitizer --tool racecheck build/limits MODE
//
// MODE one: lanes of a warp write, meet at __syncwarp, and one of them arrives at an mbarrier for all (a record);
//      all: every lane arrives (none);
//      blocks: a block copies into its shared memory (cp.async), and the other block of its cluster writes the same
//      place behind the cluster's barrier.

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

__device__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__global__ void __cluster_dims__(2, 1, 1) by_cluster_barrier(int* out) {
  __shared__ __align__(16) int numbers[4 * 32];
  const int lane = threadIdx.x;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(numbers + 4 * lane)),
               "l"(out + 4 * lane)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  meet_cluster();
  if (blockIdx.x == 1) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(numbers + 4 * lane)), "r"(0));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(lane) : "memory");
  }
  meet_cluster();
  if (blockIdx.x == 0) out[lane] = numbers[4 * lane];
}

int main(int arguments, char** words) {
  if (arguments != 2) return 2;
  int* out = nullptr;
  cudaMalloc(&out, 4 * 32 * sizeof(int));
  if (strcmp(words[1], "blocks") == 0) {
    by_cluster_barrier<<<2, 32>>>(out);
  } else {
    by_mbarrier<<<1, 64>>>(out, strcmp(words[1], "all") == 0);
  }
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
