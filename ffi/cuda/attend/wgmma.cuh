// Matrix products of a warpgroup (wgmma, sm_90a): descriptors of tiles in shared memory and the shapes attention uses.
//
// A tile is [rows][64 channels] in bfloat16: 128 bytes a row, in the 128-byte swizzle, so that its 16-byte unit u of
// row r lies at 128 r + 16 (u ^ r % 8); 1024-byte aligned. Wider rows are several tiles side by side.
#pragma once

#include <cstdint>

namespace dsv4::cuda::attention {

constexpr int kTileRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // eight rows

// An operand in shared memory. In a cluster the high byte of a shared address is the block's rank, which must not reach
// the descriptor. Offsets are made where they are used: hoisted out of loops they would fill the registers.
struct Operand {
  uint32_t low;
  uint32_t high;

  __device__ __forceinline__ Operand(uint32_t address, uint32_t leading_bytes)
      : low((address & 0x3FFFFu) >> 4 | leading_bytes >> 4 << 16), high(1u << 30 | kSwizzleBytes >> 4) {
    asm volatile("" : "+r"(low));
  }
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + (bytes >> 4)), "r"(high));
    return descriptor;
  }
};

// The summed axis runs along the rows of its tiles; 16 of it are 32 bytes.
__device__ __forceinline__ Operand along_rows(uint32_t address) { return {address, 16}; }

// The summed axis runs across the rows of its tiles; 16 of it are 2048 bytes. `tile_bytes` from one tile of 64 columns
// to the next.
__device__ __forceinline__ Operand across_rows(uint32_t address, uint32_t tile_bytes) { return {address, tile_bytes}; }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers across products in flight.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define DSV4_8(how, d, i) \
  how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), how(d[i + 6]), how(d[i + 7])
#define DSV4_32(how, d, i) DSV4_8(how, d, i), DSV4_8(how, d, i + 8), DSV4_8(how, d, i + 16), DSV4_8(how, d, i + 24)
#define DSV4_PRODUCT_64X64                                                  \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

// D[64, 64] = A[64, 16] B[16, 64], both along rows of shared memory.
__device__ __forceinline__ void wgmma_64x64_first(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" DSV4_PRODUCT_64X64 "%32, %33, p, 1, 1, 0, 0;\n}\n"
               : DSV4_32("=f", d, 0)
               : "l"(a), "l"(b), "r"(0));
}

// The same, added to D.
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" DSV4_PRODUCT_64X64 "%32, %33, p, 1, 1, 0, 0;\n}\n"
               : DSV4_32("+f", d, 0)
               : "l"(a), "l"(b), "r"(1));
}

// D[64, 128] += A[64, 16] B[16, 128]; A in registers kA .. kA + 3, B across rows of shared memory, D in registers from
// kD.
template <int kD, int kA>
__device__ __forceinline__ void wgmma_64x128(float (&d)[128], const uint32_t (&a)[16], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
      : DSV4_32("+f", d, kD), DSV4_32("+f", d, kD + 32)
      : "r"(a[kA]), "r"(a[kA + 1]), "r"(a[kA + 2]), "r"(a[kA + 3]), "l"(b), "r"(1));
}

// D[64, 64] += A[64, 16] B[16, 64], as above.
template <int kD, int kA>
__device__ __forceinline__ void wgmma_64x64(float (&d)[128], const uint32_t (&a)[16], uint64_t b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" DSV4_PRODUCT_64X64
               "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
               : DSV4_32("+f", d, kD)
               : "r"(a[kA]), "r"(a[kA + 1]), "r"(a[kA + 2]), "r"(a[kA + 3]), "l"(b), "r"(1));
}

#undef DSV4_PRODUCT_64X64
#undef DSV4_32
#undef DSV4_8

}  // namespace dsv4::cuda::attention
