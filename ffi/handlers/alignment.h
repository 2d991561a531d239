// The alignment that CUDA kernels take for granted: they load and store 16 bytes at once.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace dsv4 {

constexpr uintptr_t kAlignment = 16;

// Whether an operand begins where kernels can load it. Indices are loaded one by one.
inline bool is_aligned(const xla::ffi::AnyBuffer& buffer) {
  const auto type = buffer.element_type();
  return type == xla::ffi::S32 || type == xla::ffi::PRED || buffer.element_count() == 0 ||
         reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment == 0;
}

}  // namespace dsv4
