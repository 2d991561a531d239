// The producing warps of attention on Hopper: from where rows lie to decoded tiles in shared memory.
#pragma once

#include "cuda/attend/scout.cuh"

namespace dsv4::cuda::attention {

constexpr int kProducerWarps = kTileRows / kWarpRows;

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// One of kProducerWarps, with eight rows of every tile.
template <class WindowCodec, class EntryCodec>
struct Producer {
  const Tiles& tiles;
  const Shared& shared;
  int warp;
  int lane;

  __device__ __forceinline__ RowSource row(int tile) const { return shared.row(tile, warp * kWarpRows + lane / 4); }
  __device__ __forceinline__ void wait_for_scouts(int tile) const { wait(shared.known(tile), tile / kAhead % 2); }
  // Whoever multiplies makes what is stored here visible to the products. A fence of this warp would wait for the loads
  // of the next tile.
  __device__ __forceinline__ void hand_over(int tile) const {
    __syncwarp();
    if (lane == 0) arrive(shared.full(tile));
  }

  // Loads the rows of a tile, if they are decoded.
  template <class D>
  __device__ __forceinline__ void fetch(int tile, typename D::Raw& loaded) const {
    if constexpr (!D::kCopies) {
      wait_for_scouts(tile);
      const RowSource from = row(tile);
#pragma unroll
      for (int j = 0; j < D::kUnits; ++j) D::fetch(from, lane % 4, j, loaded);
    }
  }

  // Decodes loaded rows into their places. Where a unit was, its registers take the same unit of the next tile at once.
  template <class D>
  __device__ __forceinline__ void decode_tile(int tile, bool more, typename D::Raw& loaded) const {
    constexpr int kTogether = (D::kUnits + 2) / 3;
    if (more) wait_for_scouts(tile + 1);
    wait_for_consumers(shared, tile, kStages);
    const RowSource now = row(tile);
    RowSource next{nullptr, {0u, 0u}};
    if (more) next = row(tile + 1);
    const int place = lane / 4;
    const RowPlace to{shared.tiles(tile) + (warp * kWarpRows + place) * kTileRowBytes, place, lane % 4};
#pragma unroll
    for (int j = 0; j < D::kUnits; ++j) {
      D::put(now, j, loaded, to);
      if (more) D::fetch(next, lane % 4, j, loaded);
      // Without a wait here and there the compiler puts the loads of all units behind the stores of the last.
      if (more && j % kTogether == kTogether - 1) wait_for_scouts(tile + 1);
    }
  }

  // Tiles begin .. end - 1 that are decoded, of which the first is loaded. `then()` loads what follows them, when there
  // are registers for it.
  template <class D, class Then>
  __device__ __forceinline__ void decode_tiles(int begin, int end, typename D::Raw& loaded, Then&& then) const {
    constexpr bool kLast = std::is_same_v<std::decay_t<Then>, Nothing>;
#pragma unroll 1
    for (int tile = begin; tile < (kLast ? end : end - 1); ++tile) {
      decode_tile<D>(tile, !kLast || tile + 1 < end, loaded);
      hand_over(tile);
    }
    if constexpr (!kLast) {
      decode_tile<D>(end - 1, false, loaded);
      then();
      hand_over(end - 1);
    }
  }

  // Tiles begin .. end - 1 that are copied, each handed over when the next is on its way.
  template <class D, class Then>
  __device__ __forceinline__ void copy_tiles(int begin, int end, Then&& then) const {
    for (int tile = begin; tile < end; ++tile) {
      wait_for_scouts(tile);
      wait_for_consumers(shared, tile, kStages);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const int at = warp * kWarpRows + i;
        D::copy(shared.row(tile, at).data, lane, shared.tiles(tile) + at * kTileRowBytes, i);
      }
      commit_copies();
      if (tile > begin) {
        wait_for_copies<1>();
        hand_over(tile - 1);
      }
    }
    then();
    wait_for_copies<0>();
    hand_over(end - 1);
  }

  template <class D, class Then>
  __device__ __forceinline__ void run(int begin, int end, typename D::Raw& loaded, Then&& then) const {
    if constexpr (D::kCopies) {
      copy_tiles<D>(begin, end, then);
    } else {
      decode_tiles<D>(begin, end, loaded, then);
    }
  }

  __device__ __forceinline__ void operator()() const {
    using Window = Decoder<WindowCodec>;
    using Entry = Decoder<EntryCodec>;
    const int window =
        std::is_same_v<WindowCodec, EntryCodec> ? 0 : max(0, min(tiles.count, tiles.window - tiles.first));
    typename Entry::Raw entries;
    const auto begin_entries = [&] {
      if (window < tiles.count) fetch<Entry>(window, entries);
    };
    if (window > 0) {
      typename Window::Raw rows;
      fetch<Window>(0, rows);
      run<Window>(0, window, rows, begin_entries);
    } else {
      begin_entries();
    }
    if (window < tiles.count) run<Entry>(window, tiles.count, entries, Nothing{});
  }
};

}  // namespace dsv4::cuda::attention
