// The gathers on the GPU: chosen entries, all entries, the window; dequantized to dense rows.
//
// Reading is all there is to do, so it is arranged for bytes in flight: a warp takes several rows at once, its lanes
// look up where they lie, all lanes load all of them, and only then is anything decoded. Writes are 16 bytes a lane,
// neighbouring lanes side by side.

#include "cuda/core/launch.cuh"
#include "cuda/core/warp_rows.cuh"
#include "layout/places.h"
#include "ops/kernels.h"

namespace dsv4::cuda {
namespace {

constexpr int kGatherWarps = 8;
constexpr int kEnoughWarps = 2048;  // warps come first: only where there are as many do they take several rows each

// The most rows that a warp has in flight.
template <class Codec>
constexpr int rows_in_flight() {
  constexpr int kBytes = Layout<Codec>::kDataBytes;
  return kBytes >= 2048 ? 2 : kBytes >= 256 ? 4 : 8;
}

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
    const int slot = params.slots[query], visible = params.counts[query];
    const EntryPlace place =
        place_of_entry(params.pool, params.table, *params.layer, entry < visible ? slot : -1, entry);
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
    const WindowPlace place =
        place_in_window(params.window, params.positions, *params.layer, params.slots[query], params.last[query] - back);
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
template <class Codec, int kAlignment, class T>
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
        copy_words<kCodeBytes, kAlignment>(codes, from.data + channel * Codec::kCodeBits / 8);
      }
      scale = load_stored_scale<Codec>(from.scales, channel, global_scale);
    }
    if constexpr (Codec::kQuantized < Codec::kWidth) {
      if (channel >= Codec::kQuantized) {
        const int offset = L::kCodeBytes + (channel - Codec::kQuantized) * static_cast<int>(sizeof(Plain));
        copy_words<kPlainBytes, kAlignment>(plain, from.data + offset);
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

template <class Codec, int kAlignment, class T, class Sources>
__global__ void __launch_bounds__(kGatherWarps* kWarp)
    gather_kernel(uint8_t* pool, float global_scale, Rows rows, unsigned warp_rows, Sources sources) {
  constexpr int kLanes = std::min(kWarp, Codec::kWidth / kLaneChannels<T>);  // of a row
  constexpr int kParts = Codec::kWidth / kLaneChannels<T> / kLanes;
  constexpr int kAbreast = kWarp / kLanes;
  constexpr int kSteps = rows_in_flight<Codec>() / kAbreast;
  const int lane = threadIdx.x % kWarp;
  const unsigned total = static_cast<unsigned>(rows.queries * rows.count);
  const unsigned first = (blockIdx.x * kGatherWarps + threadIdx.x / kWarp) * warp_rows;
  if (first >= total) return;
  const int here = static_cast<int>(min(warp_rows, total - first));

  Source mine{-1, -1, -1};
  if (lane < here) {
    mine = sources(first + lane);
    rows.positions[first + lane] = mine.position;
    rows.valid[first + lane] = mine.position >= 0;
  }

  const unsigned present = __ballot_sync(kAllLanes, mine.data >= 0);
  StoredChannels<Codec, kAlignment, T> loaded[kSteps][kParts];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = step * kAbreast + lane / kLanes;
    const int64_t data = __shfl_sync(kAllLanes, mine.data, row), scales = __shfl_sync(kAllLanes, mine.scales, row);
    if ((present >> row & 1u) == 0u) continue;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int channel = (part * kLanes + lane % kLanes) * kLaneChannels<T>;
      loaded[step][part].load({pool + data, pool + scales}, channel, global_scale);
    }
  }
  auto* to = static_cast<LaneChannels<T>*>(rows.values) + static_cast<int64_t>(first) * (kLanes * kParts);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = step * kAbreast + lane / kLanes;
    if (row >= here) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int place = part * kLanes + lane % kLanes;
      LaneChannels<T> values{};
      if (present >> row & 1u) values = loaded[step][part].decoded(place * kLaneChannels<T>);
      to[row * (kLanes * kParts) + place] = values;
    }
  }
}

template <template <class> class Sources, class Params>
const char* launch_gather(CUstream_st* stream, const char* op, const Pool& pool, const Rows& rows,
                          const Params& params) {
  const int64_t total = rows.queries * rows.count;
  if (total == 0) return nullptr;
  with_codec(pool, [&](auto codec, auto alignment) {
    using Codec = decltype(codec);
    with_element(rows.element, [&](auto element) {
      const auto warp_rows =
          static_cast<unsigned>(std::clamp<int64_t>(total / kEnoughWarps, 1, rows_in_flight<Codec>()));
      gather_kernel<Codec, decltype(alignment)::value, decltype(element)>
          <<<blocks_for(total, kGatherWarps * warp_rows), kGatherWarps * kWarp, 0, stream>>>(
              pool.data, pool.global_scale, rows, warp_rows, Sources<Codec>{params});
    });
  });
  return launch_error(op);
}

}  // namespace

const char* gather_entries(CUstream_st* stream, const GatherEntriesParams& params) {
  return launch_gather<EntrySources>(stream, "gather_entries", params.pool, params.rows, params);
}

const char* gather_window(CUstream_st* stream, const GatherWindowParams& params) {
  return launch_gather<WindowSources>(stream, "gather_window", params.window, params.rows, params);
}

}  // namespace dsv4::cuda
