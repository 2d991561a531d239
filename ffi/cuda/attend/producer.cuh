// The producing warps of attention on Hopper: from numbers of rows to decoded tiles in shared memory.
#pragma once

#include "cuda/attend/rows.cuh"
#include "cuda/attend/shared.cuh"

namespace dsv4::cuda::attention {

constexpr int kProducerWarps = 4;
constexpr int kThreads = 256 + 32 * kProducerWarps;
constexpr int kSteps = kTileRows / (kWarpRows * kProducerWarps);  // of a producing warp for a tile

// The tiles of one of a token's blocks: those of the window, then those of entries.
struct Tiles {
  int window;  // of the token
  int first;
  int count;
};

__device__ __forceinline__ Tiles tiles_of_block(const AttendedRows& rows, int block, int blocks) {
  const int window = (rows.window + kTileRows - 1) / kTileRows;
  const int all = window + (rows.entries + kTileRows - 1) / kTileRows;
  const int first = static_cast<int>(static_cast<int64_t>(all) * block / blocks);
  return {window, first, static_cast<int>(static_cast<int64_t>(all) * (block + 1) / blocks) - first};
}

// A warp brings eight rows a step. Rows of four steps are known at once, one to a lane, while those of the next four
// are looked up.
template <class WindowCodec, class EntryCodec, int kAlignment>
struct Producer {
  using Window = Decoder<WindowCodec>;
  using Entry = Decoder<EntryCodec>;
  static constexpr bool kTailApart = Window::kTailApart || Entry::kTailApart;

  const AttendParams& params;
  const AttendedRows& rows;
  const Tiles& tiles;
  const Shared& shared;
  int warp;
  int lane;

  // What the lane looks up of the group of steps that begins at `step`: the tile, and the key within its tile.
  __device__ __forceinline__ int tile_of(int step) const { return tiles.first + step / kSteps; }
  __device__ __forceinline__ int first_row(int step) const {
    return (step % kSteps * kProducerWarps + warp) * kWarpRows;
  }
  __device__ __forceinline__ bool in_window(int step) const { return tile_of(step) < tiles.window; }
  __device__ __forceinline__ int number(int step) const {
    const int tile = tile_of(step);
    return (tile < tiles.window ? tile : tile - tiles.window) * kTileRows + first_row(step) + lane % kWarpRows;
  }

  __device__ __forceinline__ void first(int group, Lookup& lookup) const {
    const int step = group + lane / kWarpRows;
    look_up_first(params, rows, in_window(step), number(step), lookup);
  }
  __device__ __forceinline__ void second(int group, Lookup& lookup) const {
    const int step = group + lane / kWarpRows;
    look_up_second(params, rows, in_window(step), number(step), lookup);
  }
  __device__ __forceinline__ RowSource third(int group, const Lookup& lookup) const {
    const int step = group + lane / kWarpRows;
    const bool window = in_window(step);
    const EntryPlace place = look_up_third(params, rows, window, number(step), lookup);
    RowSource source{nullptr, 0, {__float_as_uint(1.0f), 0u}};
    if (place.page == nullptr) return source;
    if (window) {
      // A displaced row's page has another number of rows than a ring.
      const Pool& pool = lookup.first == window_position(rows, number(step)) ? params.window : params.displaced;
      locate<WindowCodec>(pool, place, source);
    } else {
      locate<EntryCodec>(params.entries, place, source);
    }
    return source;
  }
  template <class Codec>
  __device__ __forceinline__ static void locate(const Pool& pool, const EntryPlace& place, RowSource& source) {
    const StoredRow row = stored_row<Codec>(place.page, pool.rows, place.row);
    source.data = row.data;
    source.scales = static_cast<int>(row.scales - row.data);
    source.scale = Decoder<Codec>::scale(row.scales, pool.global_scale);
  }

  // What logits and weights of the step's keys are multiplied by, and whether they exist.
  __device__ __forceinline__ void describe(int step, const RowSource& mine) const {
    if (lane / kWarpRows != step % 4) return;
    const int key = first_row(step) + lane % kWarpRows, stage = step / kSteps % 2;
    const bool exists = mine.data != nullptr;
    const bool window = in_window(step);
    const float coded = window ? Window::row_scale(mine) : Entry::row_scale(mine);
    const float tail = (window ? Window::kTailApart : Entry::kTailApart) ? 1.0f : coded;
    shared.facts(stage, kExists)[key] = exists ? 0.0f : -INFINITY;
    shared.facts(stage, kLogitFactor)[key] = exists ? coded * (params.scale * kLog2E) : 0.0f;
    shared.facts(stage, kWeightFactor)[key] = exists ? coded : 0.0f;
    if constexpr (kTailApart) shared.facts(stage, kTailFactor)[key] = exists ? tail / coded : 0.0f;
  }

  __device__ __forceinline__ void wait_for_stage(int step) const {
    if (step % kSteps != 0) return;
    const int tile = step / kSteps;
    wait(shared.empty(tile % 2), (tile / 2 % 2) ^ 1);
  }

  __device__ __forceinline__ void hand_over(int step) const {
    if (step % kSteps != kSteps - 1) return;
    fence_async();
    __syncwarp();
    if (lane == 0) arrive(shared.full(step / kSteps % 2));
  }

  template <class D>
  __device__ __forceinline__ void copy_step(int step, const RowSource& mine) const {
    wait_for_stage(step);
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      const auto address = reinterpret_cast<unsigned long long>(mine.data);
      const auto data = __shfl_sync(kAll, address, step % 4 * kWarpRows + row);
      D::copy(reinterpret_cast<const uint8_t*>(data), params.queries, lane,
              shared.tiles(step / kSteps % 2) + (first_row(step) + row) * kTileRowBytes, row);
    }
    describe(step, mine);
    if (step % kSteps != kSteps - 1) return;
    wait_for_copies();
    hand_over(step);
  }

  // The row of a step that this lane helps to decode.
  __device__ __forceinline__ RowSource row_of(int step, const RowSource& group) const {
    return group.from_lane(step % 4 * kWarpRows + lane / 4);
  }

  template <class D>
  __device__ __forceinline__ void fetch_step(const RowSource& row, typename D::Raw (&raw)[D::kUnits]) const {
#pragma unroll
    for (int j = 0; j < D::kUnits; ++j) D::template fetch<kAlignment>(row, lane % 4, j, raw[j]);
  }

  // Decodes a step's rows, each place in registers taken by the next step's as soon as it is free.
  template <class D>
  __device__ __forceinline__ void put_step(int step, const RowSource& mine, bool more, const RowSource& next,
                                           typename D::Raw (&raw)[D::kUnits]) const {
    wait_for_stage(step);
    describe(step, mine);
    const RowSource row = row_of(step, mine);
    RowSource following{nullptr, 0, {0u, 0u}};
    if (more) following = step % 4 == 3 ? row_of(step + 1, next) : row_of(step + 1, mine);
    const int place = lane / 4;
    const RowPlace to{shared.tiles(step / kSteps % 2) + (first_row(step) + place) * kTileRowBytes, place, lane % 4};
#pragma unroll
    for (int j = 0; j < D::kUnits; ++j) {
      D::put(row, j, raw[j], to);
      D::template fetch<kAlignment>(following, lane % 4, j, raw[j]);
    }
    hand_over(step);
  }

  // Looks ahead by one of three steps towards the rows of the next group.
  __device__ __forceinline__ void look_ahead(int step, int last, Lookup& lookup, RowSource& next) const {
    const int group = step / 4 * 4 + 4;
    if (group >= last) return;
    if (step % 4 == 0) first(group, lookup);
    if (step % 4 == 1) second(group, lookup);
    if (step % 4 == 2) next = third(group, lookup);
  }

  __device__ __forceinline__ RowSource look_up_now(int group) const {
    Lookup lookup;
    first(group, lookup);
    second(group, lookup);
    return third(group, lookup);
  }

  // Steps begin .. end - 1, all of them of one decoder. `mine` holds the rows of the group that `begin` lies in.
  template <class D>
  __device__ __forceinline__ void run(int begin, int end, int last, RowSource& mine, Lookup& lookup,
                                      RowSource& next) const {
    if (begin >= end) return;
    if constexpr (D::kCopies) {
      for (int step = begin; step < end; ++step) {
        look_ahead(step, last, lookup, next);
        copy_step<D>(step, mine);
        if (step % 4 == 3) mine = next;
      }
    } else {
      typename D::Raw raw[D::kUnits];
      fetch_step<D>(row_of(begin, mine), raw);
      for (int step = begin; step < end; ++step) {
        look_ahead(step, last, lookup, next);
        put_step<D>(step, mine, step + 1 < end, next, raw);
        if (step % 4 == 3) mine = next;
      }
    }
  }

  __device__ __forceinline__ void operator()() const {
    const int steps = tiles.count * kSteps;
    if (steps == 0) return;
    RowSource mine = look_up_now(0), next = mine;
    Lookup lookup{-1, -1};
    const int window_steps = max(0, min(tiles.count, tiles.window - tiles.first)) * kSteps;
    if constexpr (std::is_same_v<WindowCodec, EntryCodec>) {
      run<Entry>(0, steps, steps, mine, lookup, next);
    } else {
      run<Window>(0, window_steps, steps, mine, lookup, next);
      run<Entry>(window_steps, steps, steps, mine, lookup, next);
    }
  }
};

}  // namespace dsv4::cuda::attention
