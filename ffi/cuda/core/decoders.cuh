// Stored rows read on the GPU: where a row lies, by token or by request of the step's plan, and its channels decoded.
//
// A lane looks up one row; all lanes then load channels of all rows, and only after that is anything decoded.
#pragma once

#include <type_traits>

#include "cuda/core/warp_rows.cuh"
#include "layout/codecs.h"
#include "layout/places.h"

namespace dsv4::cuda {

// Where in its pool a row is stored, and which position it stands for; -1 where there is none. Offsets, because the
// compiler no longer knows a pointer from another lane to be one to global memory.
struct Source {
  int64_t data;
  int64_t scales;
  int position;
};

template <class Codec>
__device__ __forceinline__ Source source_of(const Pool& pool, uint8_t* page, int row, int position) {
  const StoredRow stored = stored_row<Codec>(page, pool.rows, row);
  return {stored.data - pool.data, stored.scales - pool.data, position};
}

// Both kinds of sources count in 32 bits (more rows fit no GPU), and load side by side what does not depend on another:
// their loads are the latency of a small gather.
template <class Codec>
struct EntrySources {
  GatherEntriesParams params;

  __device__ __forceinline__ Source operator()(unsigned out) const {
    const unsigned count = static_cast<unsigned>(params.rows.count), query = out / count;
    const int entry = params.indices == nullptr ? static_cast<int>(out - query * count) : params.indices[out];
    const EntryQuery from = params.indices != nullptr
                                ? entries_of_token(params.plan, query, params.ratio)
                                : entries_of_request(params.plan, query, params.table.slots, params.ratio);
    const EntryPlace place =
        place_of_entry(params.pool, params.table, *params.layer, entry < from.visible ? from.slot : -1, entry);
    if (place.page == nullptr) return {-1, -1, -1};
    return source_of<Codec>(params.pool, place.page, place.row, entry * params.ratio);
  }
};

template <class Codec>
struct WindowSources {
  GatherWindowParams params;

  __device__ __forceinline__ Source operator()(unsigned out) const {
    const unsigned count = static_cast<unsigned>(params.rows.count), query = out / count;
    const int64_t back = count - 1 - (out - query * count);
    const WindowQuery from =
        window_of_request(params.plan, query, static_cast<int>(params.window.pages), params.before);
    const WindowPlace place =
        place_in_window(params.window, params.positions, *params.layer, from.slot, from.last - back);
    if (place.page == nullptr) return {-1, -1, -1};
    return source_of<Codec>(params.window, place.page, place.row, place.position);
  }
};

// Floats of neighbouring E4M3 codes.
template <int kCodes>
__device__ __forceinline__ void floats_of_e4m3(const uint32_t* codes, float (&x)[kCodes]) {
#pragma unroll
  for (int i = 0; i < kCodes; i += 2) {
    const uint16_t two = static_cast<uint16_t>(codes[i / 4] >> (i % 4 * 8));
#if __CUDA_ARCH__ >= 890
    floats_from_halves(halves_from_e4m3x2(two), x[i], x[i + 1]);
#else
    x[i] = float_from_e4m3(static_cast<uint8_t>(two)), x[i + 1] = float_from_e4m3(static_cast<uint8_t>(two >> 8));
#endif
  }
}

// Floats of neighbouring E2M1 codes. The size of a code, moved to a half's lowest exponent bits and highest mantissa
// bit, makes the value times 2^-14, exactly, whether or not the half is a normal number.
template <int kCodes>
__device__ __forceinline__ void floats_of_e2m1(uint32_t codes, float (&x)[kCodes]) {
  constexpr int kPairs = kCodes / 2;
  constexpr uint32_t kTwoToThe14 = 0x74007400u;
  const uint32_t pairs = kCodes == 8 ? codes : __byte_perm(codes, 0u, 0x4140);  // codes i and i + kPairs 16 bits apart
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t pair = pairs >> (4 * i);
    const uint32_t small = (pair << 12 & 0x80008000u) | (pair << 9 & 0x0E000E00u);
    uint32_t halves;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(small), "r"(kTwoToThe14));
    floats_from_halves(halves, x[i], x[i + kPairs]);
  }
}

// The consecutive channels of one lane: 16 bytes of what is written.
template <class T>
constexpr int kLaneChannels = 16 / sizeof(T);

template <class T>
struct alignas(16) LaneChannels {
  T x[kLaneChannels<T>];
};

__device__ __forceinline__ LaneChannels<float> lane_channels(const float (&x)[kLaneChannels<float>]) {
  return {x[0], x[1], x[2], x[3]};
}

__device__ __forceinline__ LaneChannels<bfloat16> lane_channels(const float (&x)[kLaneChannels<bfloat16>]) {
  LaneChannels<bfloat16> channels;
#pragma unroll
  for (int i = 0; i < kLaneChannels<bfloat16>; i += 2) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x[i + 1]), "f"(x[i]));
    memcpy(channels.x + i, &pair, sizeof pair);
  }
  return channels;
}

// What a lane loads of a row that becomes T, kept so that no load waits for another: codes apart from plain values,
// because some lanes load the ones and some the others, which in the same registers would happen in turn; whole words,
// because what is shifted into place is waited for; and nothing computed yet.
template <class Codec, class T>
struct StoredChannels {
  using L = Layout<Codec>;
  using Plain = typename Codec::Plain;
  static constexpr int kChannels = kLaneChannels<T>;
  static constexpr int kPlainBytes = kChannels * static_cast<int>(sizeof(Plain));
  static constexpr int kCodeBytes = kChannels * Codec::kCodeBits / 8;

  alignas(16) uint32_t plain[kPlainBytes / 4];
  alignas(8) uint32_t codes[(kCodeBytes + 3) / 4];
  StoredScale scale;

  __device__ __forceinline__ void load(const StoredRow& from, int channel, float global_scale) {
    if constexpr (Codec::kQuantized > 0) {
      if (channel < Codec::kQuantized) {
        copy_words<kCodeBytes>(codes, from.data + channel * Codec::kCodeBits / 8);
      }
      scale = load_stored_scale<Codec>(from.scales, channel, global_scale);
    }
    if constexpr (Codec::kQuantized < Codec::kWidth) {
      if (channel >= Codec::kQuantized) {
        const int offset = L::kCodeBytes + (channel - Codec::kQuantized) * static_cast<int>(sizeof(Plain));
        copy_words<kPlainBytes>(plain, from.data + offset);
      }
    }
  }

  __device__ __forceinline__ LaneChannels<T> decoded(int channel) const {
    if constexpr (Codec::kQuantized == 0) {
      return decoded_plain();
    } else {
      if (channel >= Codec::kQuantized) return decoded_plain();
      return decoded_codes();
    }
  }

  __device__ __forceinline__ LaneChannels<T> decoded_codes() const {
    const float factor = Codec::scale(scale.block_code, scale.row_scale);
    float x[kChannels];
    if constexpr (Codec::kCodeBits == 8) {
      floats_of_e4m3(codes, x);
    } else {
      floats_of_e2m1(codes[0], x);
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] *= factor;
    return lane_channels(x);
  }

  __device__ __forceinline__ LaneChannels<T> decoded_plain() const {
    if constexpr (std::is_same_v<T, Plain>) {
      LaneChannels<T> same;
      memcpy(same.x, plain, sizeof same.x);
      return same;
    } else {
      Plain stored[kChannels];
      memcpy(stored, plain, sizeof stored);
      float x[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) x[i] = to_float(stored[i]);
      return lane_channels(x);
    }
  }
};

}  // namespace dsv4::cuda
