// What the kernels of an update share, decode's and prefill's: closing a window, storing a window row.
#pragma once

#include "cuda/close/hca.cuh"
#include "cuda/close/running.cuh"
#include "cuda/close/window.cuh"
#include "cuda/core/device_codecs.cuh"
#include "cuda/core/launch.cuh"
#include "layout/places.h"

namespace dsv4::cuda {

// A step with more tokens than requests, see prefill.cu.
template <class RowT, class T>
void launch_prefill(CUstream_st* stream, const UpdateParams& params);

// Stores an entry in its place, by all threads of its row; nothing if there is none.
template <int W, int N>
__device__ __forceinline__ void store_entry(const Pool& pool, const EntryPlace& place, const float (&x)[N],
                                            const RowThreads<W, N>& threads) {
  if (place.page == nullptr) return;
  visit_on_device(CodecsOf<W>{}, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    store_spread<Codec>(stored_row<Codec>(place.page, pool.rows, place.row), x, pool.global_scale, threads);
  });
}

// Closes the CSA window of token `index`, entry `row` of the step.
template <int W, class T>
__device__ __forceinline__ void close_csa_window(const Compressor& compressor, const Pool& pool,
                                                 const BlockTable& table, int64_t layer, const Token& closing,
                                                 int index, int row, const RowThreads<W>& threads) {
  const int entry = closing.position / kCsaRatio;
  const int block = block_of_entry(pool, table, closing.slot, entry);
  float x[4];
  csa_entry<W, T>(compressor, layer, closing, index, row, threads, x);
  store_entry(pool, place_in_block(pool, layer, block, entry), x, threads);
}

// Stores entry `row` of the step, an HCA entry of what the threads of the cluster have pooled.
template <class At>
__device__ __forceinline__ void store_hca_entry(const Compressor& compressor, const Pool& pool, const EntryPlace& place,
                                                int row, const At& at, const Partials<4>& partial) {
  finish_hca_entry(compressor, row, at, partial, [&](const float (&x)[4], const RowThreads<kHeadDim>& threads) {
    store_entry(pool, place, x, threads);
  });
}

// Closes the HCA window of token `index`, entry `row` of the step.
template <class T, class At>
__device__ __forceinline__ void close_hca_window(const Compressor& compressor, const Pool& pool,
                                                 const BlockTable& table, int64_t layer, const Token& closing,
                                                 int index, int row, const At& at) {
  at.begin();
  EntryPlace place{nullptr, 0};
  if (at.finishes()) place = place_of_entry(pool, table, layer, closing.slot, closing.position / kHcaRatio);
  store_hca_entry(compressor, pool, place, row, at, pool_hca_rows<T>(compressor, layer, closing, index, at));
}

// Closes the HCA window of token `index`, entry `row` of the step, from a running tail.
template <class T, int kRowsAtOnce, int N>
__device__ __forceinline__ void close_running_window(const Compressor& compressor, const Pool& pool,
                                                     const BlockTable& table, int64_t layer, const Token& closing,
                                                     int index, int row, const RowThreads<kHeadDim, N>& threads) {
  const int entry = closing.position / kHcaRatio;
  const EntryPlace place = place_of_entry(pool, table, layer, closing.slot, entry);
  float x[N];
  running_entry<T, kRowsAtOnce>(compressor, layer, closing, index, row, threads, x);
  store_entry(pool, place, x, threads);
}

// What a warp makes a window row of, besides the weights that all rows share.
struct LoadedWindowRow {
  WarpRow<kHeadDim> row;
  float cos[2];  // angles only where the row comes raw
  float sin[2];
};

// Channels that RoPE applies to are the upper half of a warp's last quad.
static_assert(kRopeDim == kQuadChannels / 2);

template <class RowT>
__device__ __forceinline__ LoadedWindowRow load_window_row(const UpdateParams& params, int index, int lane) {
  LoadedWindowRow loaded;
  const RowT* rows = static_cast<const RowT*>(params.window.rows) + static_cast<int64_t>(index) * kHeadDim;
#pragma unroll
  for (int q = 0; q < loaded.row.kQuads; ++q) load_values(rows + channel_of(q, lane), loaded.row.x[q]);
  if (params.norm.weight != nullptr && lane >= kWarp / 2) {
    const int64_t pair = static_cast<int64_t>(index) * (kRopeDim / 2) + 2 * (lane - kWarp / 2);
    load_values(params.norm.cos + pair, loaded.cos);
    load_values(params.norm.sin + pair, loaded.sin);
  }
  return loaded;
}

// The weights that raw window rows are normalized with.
__device__ __forceinline__ WarpRow<kHeadDim> load_norm_weight(const UpdateParams& params, int lane) {
  WarpRow<kHeadDim> weight{};
  if (params.norm.weight == nullptr) return weight;
#pragma unroll
  for (int q = 0; q < weight.kQuads; ++q) load_values(params.norm.weight + channel_of(q, lane), weight.x[q]);
  return weight;
}

// One warp stores the window row of a token, normalizing and rotating it first where it comes raw.
__device__ __forceinline__ void store_window_row(const UpdateParams& params, int64_t layer, const Token& token,
                                                 const LoadedWindowRow& loaded, const WarpRow<kHeadDim>& weight,
                                                 int lane) {
  const Pool& window = params.window.window;
  WarpRow<kHeadDim> row = loaded.row;
  if (params.norm.weight != nullptr) {
    float sums[row.kQuads];
#pragma unroll
    for (int q = 0; q < row.kQuads; ++q) sums[q] = sum_over_lanes(square_sum(row.x[q]));
    const float inverse = inverse_rms((sums[0] + sums[1]) + (sums[2] + sums[3]), kHeadDim, params.norm.eps);
#pragma unroll
    for (int q = 0; q < row.kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row.x[q][i] = row.x[q][i] * inverse * weight.x[q][i];
    }
    if (lane >= kWarp / 2) rotate_pairs(row.x[row.kQuads - 1], loaded.cos, loaded.sin, 0);
  }
  const int64_t page = layer * window.pages + token.slot;
  const int ring_row = token.position % window.rows;
  visit_on_device(HeadCodecs{}, window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (!std::is_base_of_v<Nvfp4Static<kHeadDim>, Codec>) {  // not a window format
      store_row<Codec, kAlignmentOf<Codec>>(
          stored_row<Codec>(window.data + page * window.page_bytes, window.rows, ring_row), row, lane,
          window.global_scale);
    }
  });
  if (lane == 0) params.window.positions[page * window.rows + ring_row] = token.position;
}

}  // namespace dsv4::cuda
