// What compute-sanitizer's racecheck takes for races and is none: three ways of this project's kernels to order
// accesses to shared memory, each by itself. All records that racecheck has of attend_kernel and update_hca_kernel are
// of these.
//
//   nvcc -arch=sm_90a -o build/limits scripts/racecheck_limits.cu
//   compute-sanitizer --tool racecheck build/limits MODE
//
// MODE    recorded   what
// one     yes        lanes of a warp write, meet at __syncwarp, and one of them arrives at an mbarrier for all
// all     no         every lane arrives
// copies  yes        a block fills its shared memory by cp.async and waits for that; behind the cluster's barrier the
//                    other block of its cluster writes the same places
// stores  no         it is filled by stores instead
// named   yes        other warps meet at a named barrier; then some threads write, all meet at __syncthreads, others
// read

#include <cstdint>
#include <cstdio>
#include <cstring>

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__global__ void by_mbarrier(float* out, bool all) {
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
  out[lane] = static_cast<float>(numbers[lane ^ 1]);
}

__device__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

constexpr int kUnits = 1024;  // of 16 bytes

__global__ void __cluster_dims__(2, 1, 1) by_cluster_barrier(const float4* from, float* out, bool copies) {
  __shared__ __align__(16) float4 rows[kUnits];
  const int thread = threadIdx.x % 128, half = threadIdx.x / 128, rank = blockIdx.x % 2;
  meet_cluster();  // both run
  if (half == 0) {
    for (int i = thread; i < kUnits; i += 128) {
      if (copies) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(rows + i)), "l"(from + i)
                     : "memory");
      } else {
        rows[i] = from[i];
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("bar.sync 1, 128;" ::: "memory");
  }
  meet_cluster();
  if (half != rank) {
    for (int i = thread; i < kUnits; i += 128) {
      uint32_t there;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(rows + i)), "r"(rank ^ 1));
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %1, %1, %1};" ::"r"(there), "f"(1.0f * i) : "memory");
    }
  }
  meet_cluster();
  float sum = 0.0f;
  for (int i = thread; i < kUnits; i += 128) sum += rows[i].x;
  if (half == rank) out[blockIdx.x * 128 + thread] = sum;
}

// The balanced sum of a value a thread, over named barrier kName.
template <int kName, int kThreads>
__device__ float over_warps(float* of_warps, int thread, float value) {
  for (int lane = 1; lane < 32; lane *= 2) value += __shfl_xor_sync(~0u, value, lane);
  if (thread % 32 == 0) of_warps[thread / 32] = value;
  asm volatile("bar.sync %0, %1;" ::"n"(kName), "n"(kThreads) : "memory");
  float sum = 0.0f;
  for (int i = 0; i < kThreads / 32; ++i) sum += of_warps[i];
  return sum;
}

// As update_hca_kernel's blocks go about it.
__global__ void __launch_bounds__(512) by_named_barriers(const float4* from, float* out, int rounds) {
  __shared__ float of_window[16], of_entry[4];
  __shared__ float4 of_splits[3][3][128];
  const int thread = threadIdx.x, split = thread / 128, own = thread % 128;
  float x = from[thread].x;
  if (thread >= 256) {
    x += over_warps<1, 256>(of_window, thread - 256, x);
    x += over_warps<1, 256>(of_window + 8, thread - 256, x);
  }
  for (int i = 0; i < rounds + thread / 32 * 7; ++i)
    x = x * 0.999f + from[(i * 37 + thread) % kUnits].x;  // warps drift
  for (int i = 0; i < 3 && split != 0; ++i) of_splits[split - 1][i][own] = {x, x, x, x};
  __syncthreads();
  for (int i = 0; i < 9 && split == 0; ++i) x += of_splits[i / 3][i % 3][own].y;
  __syncthreads();
  if (split == 0) out[blockIdx.x * 128 + own] = x + over_warps<2, 128>(of_entry, own, x);
}

int main(int arguments, char** words) {
  const char* mode = arguments == 2 ? words[1] : "";
  float4* from = nullptr;
  float* out = nullptr;
  cudaMalloc(&from, kUnits * sizeof(float4)), cudaMemset(from, 0, kUnits * sizeof(float4));
  cudaMalloc(&out, 67 * 128 * sizeof(float));
  if (strcmp(mode, "one") == 0 || strcmp(mode, "all") == 0) {
    by_mbarrier<<<1, 64>>>(out, strcmp(mode, "all") == 0);
  } else if (strcmp(mode, "copies") == 0 || strcmp(mode, "stores") == 0) {
    by_cluster_barrier<<<4, 256>>>(from, out, strcmp(mode, "copies") == 0);
  } else if (strcmp(mode, "named") == 0) {
    for (int i = 0; i < 60; ++i) by_named_barriers<<<67, 512>>>(from, out, i);
  } else {
    return 2;
  }
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
