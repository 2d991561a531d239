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

// A block's tiles of so many window rows and entries.
__device__ __forceinline__ Tiles tiles_of_block(int window_rows, int entries, unsigned block, unsigned blocks) {
  const int window = (window_rows + kTileRows - 1) / kTileRows;
  const unsigned all = window + (entries + kTileRows - 1) / kTileRows;
  const unsigned first = all * block / blocks;
  return {window, static_cast<int>(first), static_cast<int>(all * (block + 1) / blocks - first)};
}

// What a lane knows of a row that it looks up.
struct Sought {
  Lookup lookup;
  bool exists;
  RowSource row;
};

// A warpgroup that looks up rows, one to a lane: half of its warps those of even tiles, half those of odd tiles. Every
// step ends in loads that only the next step waits for, so that other work fits between them.
template <class WindowCodec, class EntryCodec>
struct Scout {
  using Window = Decoder<WindowCodec>;
  using Entry = Decoder<EntryCodec>;
  static constexpr bool kTailApart = Window::kTailApart || Entry::kTailApart;
  static constexpr int kFirstTiles = kAhead / 2;  // of a warp, which are looked up before there is a tile to sum

  const AttendParams& params;
  const AttendedRows& rows;
  const Tiles& tiles;
  const Shared& shared;
  int lane;
  Sought sought;

  __device__ __forceinline__ static int key() { return threadIdx.x / 32 % kScoutsOfTile * 32 + threadIdx.x % 32; }
  __device__ __forceinline__ static int first_tile() { return threadIdx.x / 32 % 4 / kScoutsOfTile; }
  __device__ __forceinline__ static int number(const Tiles& tiles, int tile) {
    return (tiles.first + tile - (tiles.in_window(tile) ? 0 : tiles.window)) * kTileRows + key();
  }

  // The chosen entries of a lane's first tiles, which nothing needs to be known for.
  struct Chosen {
    int entries[kFirstTiles];
  };
  __device__ __forceinline__ static Chosen first_choice(const AttendParams& params, int token, const Tiles& tiles) {
    Chosen chosen;
#pragma unroll
    for (int i = 0; i < kFirstTiles; ++i) {
      const int tile = first_tile() + 2 * i;
      const bool of_entries = tiles.has(tile) && !tiles.in_window(tile);
      chosen.entries[i] = of_entries ? chosen_entry(params, token, number(tiles, tile)) : -1;
    }
    return chosen;
  }

  __device__ __forceinline__ void first(int tile, Sought& of) const {
    if (tiles.has(tile)) look_up_first(params, rows, tiles.in_window(tile), number(tiles, tile), of.lookup);
  }
  __device__ __forceinline__ void second(int tile, Sought& of) const {
    if (tiles.has(tile)) look_up_second(params, rows, tiles.in_window(tile), number(tiles, tile), of.lookup);
  }
  __device__ __forceinline__ void third(int tile, Sought& of) const {
    if (!tiles.has(tile)) return;
    const bool window = tiles.in_window(tile);
    const EntryPlace place = look_up_third(params, rows, window, number(tiles, tile), of.lookup);
    of.exists = place.page != nullptr;
    of.row = {reinterpret_cast<const uint8_t*>(kNoRow), {__float_as_uint(1.0f), 0u}};
    if (!of.exists) return;
    if (window) {
      // A displaced row's page has another number of rows than a ring.
      const bool in_ring = of.lookup.first == window_position(rows, number(tiles, tile));
      find<WindowCodec>(in_ring ? params.window : params.displaced, place, of.row);
    } else {
      find<EntryCodec>(params.entries, place, of.row);
    }
  }
  template <class Codec>
  __device__ __forceinline__ static void find(const Pool& pool, const EntryPlace& place, RowSource& row) {
    const StoredRow stored = stored_row<Codec>(place.page, pool.rows, place.row);
    row = {stored.data, Decoder<Codec>::scale(stored, pool.global_scale)};
  }

  // Where the row lies is told before what its scale makes of it, for which a load is still on its way.
  __device__ __forceinline__ void tell(int tile, const Sought& of) const {
    if (!tiles.has(tile)) return;
    const bool by_scale = tiles.in_window(tile) ? Window::kByScale : Entry::kByScale;
    shared.put_row(tile, key(), {of.row.data, {by_scale ? of.row.scale.x : 0u, of.row.scale.y}});
    __syncwarp();
    if (lane == 0) arrive(shared.known(tile));
  }
  // What logits and weights of a key are multiplied by, and whether it exists.
  __device__ __forceinline__ void describe(int tile, const Sought& of) const {
    if (!tiles.has(tile)) return;
    const bool window = tiles.in_window(tile);
    const float coded = window ? Window::row_scale(of.row) : Entry::row_scale(of.row);
    const float tail = (window ? Window::kTailApart : Entry::kTailApart) ? 1.0f : coded;
    shared.facts(tile, kExists)[key()] = of.exists ? 0.0f : -INFINITY;
    shared.facts(tile, kLogitFactor)[key()] = of.exists ? coded * (params.scale * kLog2E) : 0.0f;
    shared.facts(tile, kWeightFactor)[key()] = of.exists ? coded : 0.0f;
    if constexpr (kTailApart) shared.facts(tile, kTailFactor)[key()] = of.exists ? tail / coded : 0.0f;
    __syncwarp();
    if (lane == 0) arrive(shared.described(tile));
  }

  // Before there is a tile to sum: the first kAhead tiles, a warp's side by side, and half of the next.
  __device__ __forceinline__ void begin(const Chosen& chosen) {
    Sought of[kFirstTiles];
#pragma unroll
    for (int i = 0; i < kFirstTiles; ++i) {
      const int tile = first_tile() + 2 * i;
      if (params.indices != nullptr && !tiles.in_window(tile)) {
        of[i].lookup.first = chosen.entries[i];
      } else {
        first(tile, of[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kFirstTiles; ++i) second(first_tile() + 2 * i, of[i]);
#pragma unroll
    for (int i = 0; i < kFirstTiles; ++i) third(first_tile() + 2 * i, of[i]);
#pragma unroll
    for (int i = 0; i < kFirstTiles; ++i) tell(first_tile() + 2 * i, of[i]);
#pragma unroll
    for (int i = 0; i < kFirstTiles; ++i) describe(first_tile() + 2 * i, of[i]);
    if (first_tile() == 0) first(kAhead, sought), second(kAhead, sought);
  }

  // While a tile is summed, and after it, when its place is free: every other tile a warp finishes with the one kAhead
  // further, and begins with the next in between.
  __device__ __forceinline__ void during(int tile) {
    (tile & 1) == first_tile() ? third(tile + kAhead, sought) : first(tile + kAhead + 1, sought);
  }
  __device__ __forceinline__ void after(int tile) {
    if ((tile & 1) != first_tile()) {
      second(tile + kAhead + 1, sought);
    } else if (tiles.has(tile + kAhead)) {
      wait_for_consumers(shared, tile + kAhead, kAhead);
      tell(tile + kAhead, sought);
      describe(tile + kAhead, sought);
    }
  }
};

}  // namespace dsv4::cuda::attention
