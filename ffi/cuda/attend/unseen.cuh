// What a token gets that sees nothing: zeros for padding, NaN where it lacks rows.
#pragma once

#include <cmath>

#include "layout/attended.h"

namespace dsv4::cuda::attention {

// Output and lse of up to `tile_heads` heads from `first_head` on, by `threads` threads of a block.
__device__ __forceinline__ void store_unseen(const AttendParams& params, const AttendedRows& rows, int first_head,
                                             int tile_heads, int threads) {
  const int heads = min(tile_heads, params.heads - first_head);
  const int64_t first_row = static_cast<int64_t>(rows.token) * params.heads + first_head;
  const int bytes = params.output_element == Element::kFloat32 ? 4 : 2;
  const uint32_t word = rows.lacking ? 0xFFFFFFFFu : 0u;  // a NaN of either element type
  auto* to = reinterpret_cast<uint4*>(static_cast<uint8_t*>(params.output) + first_row * kHeadDim * bytes);
  for (int i = threadIdx.x; i < heads * kHeadDim * bytes / 16; i += threads) to[i] = uint4{word, word, word, word};
  for (int head = threadIdx.x; head < heads; head += threads) {
    params.lse[first_row + head] = rows.lacking ? NAN : -INFINITY;
  }
}

}  // namespace dsv4::cuda::attention
