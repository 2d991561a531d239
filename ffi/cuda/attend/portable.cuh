// Attention on any GPU (sm_80 on): one token and up to 32 of its heads to a block, tiles of dequantized rows in turn.
// This is what both ways of multiplying share: rows into shared memory, and the softmax between the two products.
#pragma once

#include "cuda/attend/unseen.cuh"
#include "cuda/core/device_codecs.cuh"
#include "layout/attended.h"

namespace dsv4::cuda::attention {

constexpr int kPortableThreads = 256;
constexpr int kPortableWarps = kPortableThreads / kWarp;
constexpr int kPortableHeads = 32;

// Where a block keeps rows of T, `kRows` to a tile. Rows are padded by 16 bytes, so that eight rows lie in other banks.
template <class T, int kTileRows_>
struct PortableShared {
  static constexpr int kRows = kTileRows_;
  static constexpr int kPitch = kHeadDim + 16 / static_cast<int>(sizeof(T));

  T queries[kPortableHeads][kPitch];
  T rows[kRows][kPitch];
  float logits[kPortableHeads][kRows + 1];
  T weights[kPortableHeads][kRows + 16 / static_cast<int>(sizeof(T))];
  float peak[kPortableHeads];
  float total[kPortableHeads];
  float shrink[kPortableHeads];  // what sums so far are multiplied by before the tile's are added
  StoredRow stored[kRows];       // data is null: no such row
};

template <class Shared>
__device__ __forceinline__ void start_portable(const AttendParams& params, int token, int first_head, Shared& shared) {
  using T = std::decay_t<decltype(shared.queries[0][0])>;
  for (int place = threadIdx.x; place < kPortableHeads * kHeadDim; place += kPortableThreads) {
    const int head = place / kHeadDim, channel = place % kHeadDim;
    float value = 0.0f;
    if (first_head + head < params.heads) {
      const int64_t from = (static_cast<int64_t>(token) * params.heads + first_head + head) * kHeadDim + channel;
      value = params.query_element == Element::kFloat32 ? static_cast<const float*>(params.queries)[from]
                                                        : to_float(static_cast<const bfloat16*>(params.queries)[from]);
    }
    shared.queries[head][channel] = from_float<T>(value);
  }
  if (threadIdx.x < kPortableHeads) {
    shared.peak[threadIdx.x] = -INFINITY;
    shared.total[threadIdx.x] = 0.0f;
  }
}

// Dequantizes rows `first` .. of the window or of the entries into the tile, zeros where there is none.
template <class Shared>
__device__ __forceinline__ void load_tile(const AttendParams& params, const AttendedRows& rows, bool in_window,
                                          int first, Shared& shared) {
  const Pool& pool = in_window ? params.window : params.entries;
  if (threadIdx.x < Shared::kRows) {
    const int number = first + threadIdx.x;
    Lookup lookup;
    look_up_first(params, rows, in_window, number, lookup);
    look_up_second(params, rows, in_window, number, lookup);
    const EntryPlace place = look_up_third(params, rows, in_window, number, lookup);
    const bool displaced = in_window && lookup.first != window_position(rows, number);
    StoredRow stored{nullptr, nullptr};
    if (place.page != nullptr) {
      visit_on_device(HeadCodecs{}, pool.codec, [&](auto codec) {
        stored = stored_row<decltype(codec)>(place.page, displaced ? params.displaced.rows : pool.rows, place.row);
      });
    }
    shared.stored[threadIdx.x] = stored;
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  visit_on_device(HeadCodecs{}, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
#pragma unroll 2
    for (int row = warp; row < Shared::kRows; row += kPortableWarps) {
      const StoredRow stored = shared.stored[row];
      if (stored.data != nullptr) {
        load_row<Codec>(stored, shared.rows[row], lane, pool.global_scale);
      } else {
        const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int quad = 0; quad < WarpRow<kHeadDim>::kQuads; ++quad) {
          store_values(shared.rows[row] + channel_of(quad, lane), zeros);
        }
      }
    }
  });
}

// Weights of a tile's rows from their logits; a warp takes every eighth head.
template <class Shared>
__device__ __forceinline__ void weigh_tile(Shared& shared, float scale) {
  using T = std::decay_t<decltype(shared.weights[0][0])>;
  const int lane = threadIdx.x % kWarp;
  for (int head = threadIdx.x / kWarp; head < kPortableHeads; head += kPortableWarps) {
    const bool exists = lane < Shared::kRows && shared.stored[lane % Shared::kRows].data != nullptr;
    const float logit = exists ? shared.logits[head][lane] * scale : -INFINITY;
    float largest = logit;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    const float before = shared.peak[head], peak = fmaxf(before, largest);
    const float weight = exists ? expf(logit - peak) : 0.0f;
    const float sum = sum_over_lanes(weight);
    if (lane < Shared::kRows) shared.weights[head][lane] = from_float<T>(weight);
    __syncwarp();
    if (lane == 0) {
      const float shrink = peak == -INFINITY ? 1.0f : expf(before - peak);
      shared.shrink[head] = shrink;
      shared.total[head] = shared.total[head] * shrink + sum;
      shared.peak[head] = peak;
    }
  }
}

// What a head's sums are multiplied by at the end; one thread of the head tells its lse.
template <class Shared>
__device__ __forceinline__ float finishing_factor(const AttendParams& params, const Shared& shared, int token, int head,
                                                  int place, bool tells) {
  const float peak = shared.peak[place];
  float total = shared.total[place];
  if (tells) {
    params.lse[static_cast<int64_t>(token) * params.heads + head] = total > 0.0f ? peak + logf(total) : -INFINITY;
  }
  if (total > 0.0f && params.sinks != nullptr) total += expf(params.sinks[head] - peak);
  return total > 0.0f ? 1.0f / total : 0.0f;
}

// Stores two neighbouring channels of a head, rotated back if they are RoPE's.
__device__ __forceinline__ void store_pair(const AttendParams& params, int token, int head, int channel, float x,
                                           float y) {
  if (params.cos != nullptr && channel >= kHeadDim - kRopeDim) {
    const int angle = token * (kRopeDim / 2) + (channel - (kHeadDim - kRopeDim)) / 2;
    const float cos = params.cos[angle], sin = params.sin[angle], rotated = x * cos + y * sin;
    y = y * cos - x * sin;
    x = rotated;
  }
  const float two[2] = {x, y};
  const int64_t to = (static_cast<int64_t>(token) * params.heads + head) * kHeadDim + channel;
  if (params.output_element == Element::kFloat32) {
    store_values(static_cast<float*>(params.output) + to, two);
  } else {
    store_values(static_cast<bfloat16*>(params.output) + to, two);
  }
}

// One token's attention by a `Products`, which holds the sums of a thread:
//   multiply(shared)   logits = queries x rows
//   add(shared)        sums = sums * shrink + weights x rows
//   store(...)         sums to the output
template <class Products>
__device__ __forceinline__ void attend_portably(const AttendParams& params) {
  using Shared = typename Products::Shared;
  extern __shared__ __align__(16) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int token = blockIdx.x, first_head = blockIdx.y * kPortableHeads;
  const AttendedRows rows = attended_rows(params, token);
  Products products;
  start_portable(params, token, first_head, shared);
  __syncthreads();
  if (rows.valid) {
    for (int part = 0; part < 2; ++part) {
      const int count = part == 0 ? rows.window : rows.entries;
      for (int first = 0; first < count; first += Shared::kRows) {
        load_tile(params, rows, part == 0, first, shared);
        __syncthreads();
        products.multiply(shared);
        __syncthreads();
        weigh_tile(shared, params.scale);
        __syncthreads();
        products.add(shared);
        __syncthreads();
      }
    }
  }
  products.store(params, shared, token, first_head);
  if (rows.lacking) {
    __syncthreads();
    store_unseen(params, rows, first_head, kPortableHeads, static_cast<int>(blockDim.x));
  }
}

}  // namespace dsv4::cuda::attention
