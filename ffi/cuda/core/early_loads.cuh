// Loads that the compiler leaves where they are written, ahead of branches that may not need them: what depends on
// nothing, or on the same thing, is then in flight together.
//
// The rule: a thread loads early only what it has not written in this launch, and what no other thread of the launch
// writes. These are the launch's read-only operands (plan, layer, projections, weights, angles, block table), and rows
// of a tail of which each thread reads and writes its own channels alone, reads first. The statements are volatile, so
// they keep their order among themselves and against barriers; they clobber no memory, because then no ordinary load
// or store could pass them either, and what they order would be waited for. By the rule nothing that could pass them
// touches what they read. They are relaxed loads, which the assembler does not move behind a branch either, as it would
// weak ones that only one side of the branch uses.
#pragma once

#include "layout/codecs.h"

namespace dsv4::cuda {

__device__ __forceinline__ int32_t load_early(const int32_t* from) {
  int32_t value;
  asm volatile("ld.relaxed.cta.global.b32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

__device__ __forceinline__ void load_early(const float* from, float (&x)[1]) {
  asm volatile("ld.relaxed.cta.global.f32 %0, [%1];" : "=f"(x[0]) : "l"(from));
}

__device__ __forceinline__ void load_early(const float* from, float (&x)[2]) {
  asm volatile("ld.relaxed.cta.global.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "l"(from));
}

__device__ __forceinline__ void load_early(const float* from, float (&x)[4]) {
  asm volatile("ld.relaxed.cta.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(from));
}

__device__ __forceinline__ void load_early(const bfloat16* from, float (&x)[2]) {
  uint32_t two;
  asm volatile("ld.relaxed.cta.global.b32 %0, [%1];" : "=r"(two) : "l"(from));
  x[0] = float_of(two << 16), x[1] = float_of(two & 0xFFFF0000u);
}

__device__ __forceinline__ void load_early(const bfloat16* from, float (&x)[4]) {
  uint2 four;
  asm volatile("ld.relaxed.cta.global.v2.b32 {%0, %1}, [%2];" : "=r"(four.x), "=r"(four.y) : "l"(from));
  x[0] = float_of(four.x << 16), x[1] = float_of(four.x & 0xFFFF0000u);
  x[2] = float_of(four.y << 16), x[3] = float_of(four.y & 0xFFFF0000u);
}

}  // namespace dsv4::cuda
