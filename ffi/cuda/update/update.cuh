// What the kernels of an update share, decode's and prefill's: closing a window where its entry is stored.
#pragma once

#include "cuda/close/hca.cuh"
#include "cuda/close/running.cuh"
#include "cuda/close/window.cuh"
#include "cuda/core/device_codecs.cuh"
#include "layout/places.h"

namespace dsv4::cuda {

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

// Closes the CSA window of token `index`, entry `row` of the step. The layer is read twice, which takes no register to
// keep it in.
template <class T, int W, int N>
__device__ __forceinline__ void close_csa_window(const Compressor& compressor, const Pool& pool,
                                                 const BlockTable& table, const int32_t* layer, const Token& closing,
                                                 int index, int row, const RowThreads<W, N>& threads) {
  const int entry = closing.position / kCsaRatio;
  const int block = block_of_entry(pool, table, closing.slot, entry);
  float x[N];
  csa_entry<T>(compressor, *layer, closing, index, row, threads, x);
  store_entry(pool, place_in_block(pool, *layer, block, entry), x, threads);
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
}  // namespace dsv4::cuda
