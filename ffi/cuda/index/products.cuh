// What the scoring kernel takes of Hopper: products of a warpgroup whose first operand is in registers, and bulk copies
// from global into shared memory.
#pragma once

#include "cuda/core/mbarrier.cuh"
#include "cuda/index/keys.cuh"

namespace dsv4::cuda::index {

// ---- Matrix product: m64 n(heads) k(32 bytes), first operand in registers, fp32 accumulators.

__device__ __forceinline__ uint64_t descriptor(uint32_t shared_address) {
  // K-major rows of 128 bytes, 128-byte swizzle: groups of 8 rows are 1024 bytes apart.
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((shared_address & 0x3FFFFu) >> 4);
}

#define DSV4_ACC8(x, i)                                                                                       \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7])
#define DSV4_WGMMA64(SHAPE, TYPES, TAIL)                                                             \
  asm volatile(                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                   \
      "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPES                                            \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
      "%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1" TAIL ";\n}"                    \
      : DSV4_ACC8(acc, 0), DSV4_ACC8(acc, 8), DSV4_ACC8(acc, 16), DSV4_ACC8(acc, 24)                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

template <class Keys>
__device__ __forceinline__ void multiply(float (&acc)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (Keys::kBytes == 1) {
    DSV4_WGMMA64("m64n64k32", "e5m2.e4m3", "");
  } else {
    DSV4_WGMMA64("m64n64k16", "f16.f16", ", 0");
  }
}
template <>
__device__ __forceinline__ void multiply<Bf16Keys>(float (&acc)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  DSV4_WGMMA64("m64n64k16", "bf16.bf16", ", 0");
}

// Waits for all of them; what `acc` holds is not looked at before.
__device__ __forceinline__ void await_products(float (&acc)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;"
               : DSV4_ACC8(acc, 0), DSV4_ACC8(acc, 8), DSV4_ACC8(acc, 16), DSV4_ACC8(acc, 24)
               :
               : "memory");
}

// ---- Copies from global into shared memory by the copy engine.

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

}  // namespace dsv4::cuda::index
