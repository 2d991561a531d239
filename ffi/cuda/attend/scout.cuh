// Scouting for attention on Hopper: looking up where the rows of tiles lie before the warps that decode them want to
// know, and telling what is known of each.
#pragma once

#include "cuda/attend/rows.cuh"
#include "cuda/attend/shared.cuh"

namespace dsv4::cuda::attention {

constexpr int kScoutsOfTile = kTileRows / 32;  // warps

// The tiles of one of a token's blocks: those of the window, then those of entries.
struct Tiles {
  int window;  // of the token
  int first;
  int count;

  __device__ __forceinline__ bool has(int tile) const { return tile >= 0 && tile < count; }
  __device__ __forceinline__ bool in_window(int tile) const { return first + tile < window; }
};

__device__ __forceinline__ Tiles tiles_of_block(const AttendedRows& rows, int block, int blocks) {
  const int window = (rows.window + kTileRows - 1) / kTileRows;
  const int all = window + (rows.entries + kTileRows - 1) / kTileRows;
  const int first = static_cast<int>(static_cast<int64_t>(all) * block / blocks);
  return {window, first, static_cast<int>(static_cast<int64_t>(all) * (block + 1) / blocks) - first};
}

// A warpgroup that looks up rows, one to a lane: half of its warps those of even tiles, half those of odd tiles. Every
// step ends in loads that only the next step waits for, so that other work fits between them.
template <class WindowCodec, class EntryCodec>
struct Scout {
  using Window = Decoder<WindowCodec>;
  using Entry = Decoder<EntryCodec>;
  static constexpr bool kTailApart = Window::kTailApart || Entry::kTailApart;

  const AttendParams& params;
  const AttendedRows& rows;
  const Tiles& tiles;
  const Shared& shared;
  int warp;
  int lane;
  Lookup lookup;
  bool exists;
  RowSource row;

  __device__ __forceinline__ int key() const { return warp % kScoutsOfTile * 32 + lane; }
  __device__ __forceinline__ int number(int tile) const {
    return (tiles.first + tile - (tiles.in_window(tile) ? 0 : tiles.window)) * kTileRows + key();
  }

  __device__ __forceinline__ void first(int tile) {
    if (tiles.has(tile)) look_up_first(params, rows, tiles.in_window(tile), number(tile), lookup);
  }
  __device__ __forceinline__ void second(int tile) {
    if (tiles.has(tile)) look_up_second(params, rows, tiles.in_window(tile), number(tile), lookup);
  }
  __device__ __forceinline__ void third(int tile) {
    if (!tiles.has(tile)) return;
    const bool window = tiles.in_window(tile);
    const EntryPlace place = look_up_third(params, rows, window, number(tile), lookup);
    exists = place.page != nullptr;
    row = {reinterpret_cast<const uint8_t*>(kNoRow), {__float_as_uint(1.0f), 0u}};
    if (!exists) return;
    if (window) {
      // A displaced row's page has another number of rows than a ring.
      const bool in_ring = lookup.first == window_position(rows, number(tile));
      find<WindowCodec>(in_ring ? params.window : params.displaced, place);
    } else {
      find<EntryCodec>(params.entries, place);
    }
  }
  template <class Codec>
  __device__ __forceinline__ void find(const Pool& pool, const EntryPlace& place) {
    const StoredRow stored = stored_row<Codec>(place.page, pool.rows, place.row);
    row = {stored.data, Decoder<Codec>::scale(stored, pool.global_scale)};
  }

  // What logits and weights of a key are multiplied by, and whether it exists.
  __device__ __forceinline__ void describe(int tile, bool window) const {
    const float coded = window ? Window::row_scale(row) : Entry::row_scale(row);
    const float tail = (window ? Window::kTailApart : Entry::kTailApart) ? 1.0f : coded;
    shared.facts(tile, kExists)[key()] = exists ? 0.0f : -INFINITY;
    shared.facts(tile, kLogitFactor)[key()] = exists ? coded * (params.scale * kLog2E) : 0.0f;
    shared.facts(tile, kWeightFactor)[key()] = exists ? coded : 0.0f;
    if constexpr (kTailApart) shared.facts(tile, kTailFactor)[key()] = exists ? tail / coded : 0.0f;
  }
  // Where the row lies is told before what its scale makes of it, for which a load is still on its way.
  __device__ __forceinline__ void tell(int tile) const {
    if (!tiles.has(tile)) return;
    const bool window = tiles.in_window(tile);
    wait_for_consumers(shared, tile, kAhead);
    const bool by_scale = window ? Window::kByScale : Entry::kByScale;
    shared.put_row(tile, key(), {row.data, {by_scale ? row.scale.x : 0u, row.scale.y}});
    __syncwarp();
    if (lane == 0) arrive(shared.known(tile));
    describe(tile, window);
    __syncwarp();
    if (lane == 0) arrive(shared.described(tile));
  }

  // While a tile is summed, and after it, when its place is free: every other tile a warp finishes with the one kAhead
  // further, and begins with the next in between. From kFirst on, before there is a tile to sum.
  static constexpr int kFirst = -kAhead - 1;
  __device__ __forceinline__ void during(int tile) {
    (tile & 1) == warp / kScoutsOfTile ? third(tile + kAhead) : first(tile + kAhead + 1);
  }
  __device__ __forceinline__ void after(int tile) {
    (tile & 1) == warp / kScoutsOfTile ? tell(tile + kAhead) : second(tile + kAhead + 1);
  }
};

}  // namespace dsv4::cuda::attention
