// Codecs and pools as kernels choose and know them.
#pragma once

#include <type_traits>

#include "cuda/core/row_threads.cuh"

namespace dsv4::cuda {

// Calls `visit(Codec{})` for the codec at that place of the list; every thread takes the same branch.
template <class... Codecs, class Visitor>
__device__ __forceinline__ void visit_on_device(CodecList<Codecs...>, int index, Visitor&& visit) {
  int place = 0;
  static_cast<void>(((place++ == index ? (visit(Codecs{}), true) : false) || ...));
}

template <int W>
using CodecsOf = std::conditional_t<W == kHeadDim, HeadCodecs, KeyCodecs>;

// The same for the codecs that windows can have: NVFP4 with one scale for the whole cache is none.
template <class Visitor>
__device__ __forceinline__ void visit_window_codec(int index, Visitor&& visit) {
  visit_on_device(HeadCodecs{}, index, [&](auto codec) {
    if constexpr (!std::is_base_of_v<Nvfp4Static<kHeadDim>, decltype(codec)>) visit(codec);
  });
}

// The pool with its rows to a page as a constant.
template <int kRows>
__device__ __forceinline__ Pool with_rows(Pool pool) {
  pool.rows = kRows;
  return pool;
}

__device__ __forceinline__ bool has_layer(const Pool& pool, int64_t layer) { return layer >= 0 && layer < pool.layers; }

// Stores a row by all its threads.
template <class Codec, int N>
__device__ __forceinline__ void store_spread(StoredRow stored, const float (&x)[N], float global_scale,
                                             const RowThreads<Codec::kWidth, N>& threads) {
  const int channel = threads.channel();
  const float amax = amax_of<Codec>(x, channel);
  float row_amax = 0.0f;
  if constexpr (Codec::kNeedsRowAmax) row_amax = threads.max(amax);
  const float row_scale = Codec::row_scale(row_amax, global_scale);
  if (channel == 0) store_row_scale<Codec>(stored.scales, row_scale);
  store_scaled<Codec>(stored, x, channel, amax, row_scale);
}

}  // namespace dsv4::cuda
