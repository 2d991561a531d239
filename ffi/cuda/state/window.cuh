// A row of the sliding window on its way into its slot's ring.
#pragma once

#include "cuda/core/device_codecs.cuh"

namespace dsv4::cuda {

// One warp stores the row of a token, and records its position.
template <class Codec>
__device__ __forceinline__ void store_in_ring(const Pool& window, int32_t* positions, int64_t layer, const Token& token,
                                              const WarpRow<kHeadDim>& row, int lane) {
  const int64_t page = layer * window.pages + token.slot;
  const int ring_row = token.position % window.rows;
  store_row<Codec>(stored_row<Codec>(window.data + page * window.page_bytes, window.rows, ring_row), row, lane,
                   window.global_scale);
  if (lane == 0) positions[page * window.rows + ring_row] = token.position;
}

}  // namespace dsv4::cuda
