// The producing warps of attention on Hopper: from where rows lie to decoded tiles in shared memory.
#pragma once

#include "cuda/attend/scout.cuh"

namespace dsv4::cuda::attention {

constexpr int kProducerWarps = 4;
constexpr int kSteps = kTileRows / (kWarpRows * kProducerWarps);  // of a warp for a tile, eight rows each

template <class WindowCodec, class EntryCodec>
struct Producer {
  const Tiles& tiles;
  const Shared& shared;
  int warp;
  int lane;

  __device__ __forceinline__ int first_row(int step) const { return (step * kProducerWarps + warp) * kWarpRows; }
  __device__ __forceinline__ void wait_for_scouts(int tile) const { wait(shared.known(tile), tile / kAhead % 2); }
  // Whoever multiplies makes what is stored here visible to the products. A fence of this warp would wait for the loads
  // of the next tile.
  __device__ __forceinline__ void hand_over(int tile) const {
    __syncwarp();
    if (lane == 0) arrive(shared.full(tile));
  }

  template <class D>
  __device__ __forceinline__ void copy_tile(int tile) const {
    wait_for_scouts(tile);
    wait_for_consumers(shared, tile, kStages);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int row = 0; row < kWarpRows; ++row) {
        D::copy(shared.row(tile, first_row(step) + row).data, lane,
                shared.tiles(tile) + (first_row(step) + row) * kTileRowBytes, row);
      }
    }
    wait_for_copies();
    hand_over(tile);
  }

  template <class D>
  __device__ __forceinline__ void fetch_rows(int tile, int step, RowSource& row,
                                             typename D::Raw (&raw)[D::kUnits]) const {
    // Between two waits: without them the compiler puts these loads behind the stores of the rows before, and waits for
    // them at once.
    wait_for_scouts(tile);
    row = shared.row(tile, first_row(step) + lane / 4);
#pragma unroll
    for (int j = 0; j < D::kUnits; ++j) D::fetch(row, lane % 4, j, raw[j]);
    wait_for_scouts(tile);
  }

  template <class D>
  __device__ __forceinline__ void put_rows(int tile, int step, const RowSource& row,
                                           const typename D::Raw (&raw)[D::kUnits]) const {
    const int place = lane / 4;
    const RowPlace to{shared.tiles(tile) + (first_row(step) + place) * kTileRowBytes, place, lane % 4};
#pragma unroll
    for (int j = 0; j < D::kUnits; ++j) D::put(row, j, raw[j], to);
  }

  // Tiles begin .. end - 1, all of them of one decoder.
  template <class D>
  __device__ __forceinline__ void run(int begin, int end) const {
    if (begin >= end) return;
    if constexpr (D::kCopies) {
      for (int tile = begin; tile < end; ++tile) copy_tile<D>(tile);
    } else {
      typename D::Raw now[D::kUnits], next[D::kUnits];
      RowSource row, following{nullptr, {0u, 0u}};
      fetch_rows<D>(begin, 0, row, now);
#pragma unroll 1
      for (int step = begin * kSteps; step < end * kSteps; ++step) {
        const int tile = step / kSteps;
        if (step % kSteps == 0) wait_for_consumers(shared, tile, kStages);
        if (step + 1 < end * kSteps) fetch_rows<D>((step + 1) / kSteps, (step + 1) % kSteps, following, next);
        put_rows<D>(tile, step % kSteps, row, now);
        if (step % kSteps == kSteps - 1) hand_over(tile);
        row = following;
#pragma unroll
        for (int j = 0; j < D::kUnits; ++j) now[j] = next[j];
      }
    }
  }

  __device__ __forceinline__ void operator()() const {
    if constexpr (std::is_same_v<WindowCodec, EntryCodec>) {
      run<Decoder<EntryCodec>>(0, tiles.count);
    } else {
      const int of_window = max(0, min(tiles.count, tiles.window - tiles.first));
      run<Decoder<WindowCodec>>(0, of_window);
      run<Decoder<EntryCodec>>(of_window, tiles.count);
    }
  }
};

}  // namespace dsv4::cuda::attention
