// Bytes chosen by number.
#pragma once

#include <cstdint>

namespace dsv4::cuda {

// The bytes of eight that the low four digits of `select` name. Of a digit above 7 the byte of the digit less 8 gives
// its sign, eight times; `__byte_perm` would mask it.
__device__ __forceinline__ uint32_t four_of_eight(uint32_t low, uint32_t high, uint32_t select) {
  uint32_t four;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(four) : "r"(low), "r"(high), "r"(select));
  return four;
}

}  // namespace dsv4::cuda
