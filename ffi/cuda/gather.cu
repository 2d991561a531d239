// The gathers on the GPU: chosen entries, all entries, the window; dequantized to dense rows.
//
// Reading is all there is to do, so it is arranged for bytes in flight: a warp takes several rows at once, its lanes
// look up where they lie, all lanes load all of them, eight channels a lane and load, and only then is anything
// decoded. Writes are 16 bytes a lane, neighbouring lanes side by side.

#include "../common/entries.h"
#include "../common/kernels.h"
#include "launch.cuh"
#include "warp_rows.cuh"

namespace dsv4::cuda {
namespace {

constexpr int kGatherWarps = 4;
constexpr int kLaneChannels = 8;

// How many rows a warp has in flight: as many as about 64 bytes a lane allow.
template <class Codec>
constexpr int rows_in_flight() {
  constexpr int kLaneBytes = Layout<Codec>::kDataBytes / kWarp;
  return kLaneBytes >= 64 ? 2 : 4;
}

// Where a row is stored and which position it stands for; null and -1 where there is none.
struct Source {
  const uint8_t* data;
  const uint8_t* scales;
  int position;
};

template <class Codec>
__device__ __forceinline__ Source source_of(uint8_t* page, int64_t rows, int row, int position) {
  if (page == nullptr) return {nullptr, nullptr, -1};
  const StoredRow stored = stored_row<Codec>(page, rows, row);
  return {stored.data, stored.scales, position};
}

template <class Codec>
struct EntrySources {
  GatherEntriesParams params;

  __device__ __forceinline__ Source operator()(int64_t out) const {
    const int64_t query = out / params.rows.count;
    const int entry =
        params.indices == nullptr ? static_cast<int>(out - query * params.rows.count) : params.indices[out];
    if (entry < 0 || entry >= params.counts[query]) return {nullptr, nullptr, -1};
    const EntryPlace place = place_of_entry(params.pool, params.table, *params.layer, params.slots[query], entry);
    return source_of<Codec>(place.page, params.pool.rows, place.row, entry * params.ratio);
  }
};

template <class Codec>
struct WindowSources {
  GatherWindowParams params;

  __device__ __forceinline__ Source operator()(int64_t out) const {
    const int64_t query = out / params.rows.count, row = out - query * params.rows.count;
    const WindowPlace place = place_in_window(params.window, params.positions, *params.layer, params.slots[query],
                                              params.last[query] - (params.rows.count - 1) + row);
    return source_of<Codec>(place.page, params.window.rows, place.row, place.position);
  }
};

__device__ __forceinline__ const uint8_t* from_lane(const uint8_t* pointer, int lane) {
  return reinterpret_cast<const uint8_t*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Two floats of two E4M3 codes.
__device__ __forceinline__ float2 floats_of_e4m3x2(uint16_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  float2 values;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(values.x), "=f"(values.y)
      : "r"(halves));
  return values;
#else
  return {float_from_e4m3(static_cast<uint8_t>(codes)), float_from_e4m3(static_cast<uint8_t>(codes >> 8))};
#endif
}

// What one lane loads of a row: eight consecutive channels, as stored, and their scale.
template <class Codec, int kAlignment>
struct StoredChannels {
  using L = Layout<Codec>;
  static constexpr int kPlainBytes = kLaneChannels * static_cast<int>(sizeof(typename Codec::Plain));
  static constexpr int kCodeBytes = kLaneChannels * Codec::kCodeBits / 8;
  static constexpr int kBytes = Codec::kQuantized == Codec::kWidth ? kCodeBytes : kPlainBytes;

  alignas(16) uint8_t bytes[kBytes];
  float scale;

  __device__ __forceinline__ void load(const Source& from, int channel, float global_scale) {
    if (channel >= Codec::kQuantized) {
      if constexpr (Codec::kQuantized < Codec::kWidth) {
        const int offset =
            L::kCodeBytes + (channel - Codec::kQuantized) * static_cast<int>(sizeof(typename Codec::Plain));
        copy_words<kPlainBytes, kAlignment>(bytes, from.data + offset);
      }
    } else if constexpr (Codec::kQuantized > 0) {
      copy_words<kCodeBytes, kAlignment>(bytes, from.data + channel * Codec::kCodeBits / 8);
      scale = load_scale<Codec>(from.scales, channel, global_scale);
    }
  }

  __device__ __forceinline__ void decode(int channel, float (&x)[kLaneChannels]) const {
    if (channel >= Codec::kQuantized) {
      if constexpr (Codec::kQuantized < Codec::kWidth) {
        typename Codec::Plain plain[kLaneChannels];
        memcpy(plain, bytes, sizeof plain);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) x[i] = to_float(plain[i]);
      }
    } else if constexpr (Codec::kCodeBits == 8) {
      uint16_t codes[kLaneChannels / 2];
      memcpy(codes, bytes, sizeof codes);
#pragma unroll
      for (int i = 0; i < kLaneChannels / 2; ++i) {
        const float2 pair = floats_of_e4m3x2(codes[i]);
        x[2 * i] = pair.x * scale, x[2 * i + 1] = pair.y * scale;
      }
    } else {
      uint32_t codes;
      memcpy(&codes, bytes, sizeof codes);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) x[i] = float_from_e2m1((codes >> (4 * i)) & 15u) * scale;
    }
  }
};

__device__ __forceinline__ void store_eight(float* to, const float (&x)[kLaneChannels]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store_eight(bfloat16* to, const float (&x)[kLaneChannels]) {
  uint32_t pairs[kLaneChannels / 2];
#pragma unroll
  for (int i = 0; i < kLaneChannels / 2; ++i) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <class Codec, int kAlignment, class T, class Sources>
__global__ void __launch_bounds__(kGatherWarps* kWarp) gather_kernel(Rows rows, float global_scale, Sources sources) {
  constexpr int kRows = rows_in_flight<Codec>();
  constexpr int kParts = (Codec::kWidth + kWarp * kLaneChannels - 1) / (kWarp * kLaneChannels);
  const int lane = threadIdx.x % kWarp;
  const int64_t total = rows.queries * rows.count;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kGatherWarps + threadIdx.x / kWarp) * kRows;

  Source mine{nullptr, nullptr, -1};
  if (lane < kRows && first + lane < total) {
    mine = sources(first + lane);
    rows.positions[first + lane] = mine.position;
    rows.valid[first + lane] = mine.position >= 0;
  }

  StoredChannels<Codec, kAlignment> loaded[kRows][kParts];
  bool present[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const Source from{from_lane(mine.data, row), from_lane(mine.scales, row), 0};
    present[row] = from.data != nullptr;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int channel = (part * kWarp + lane) * kLaneChannels;
      if (present[row] && channel < Codec::kWidth) loaded[row][part].load(from, channel, global_scale);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (first + row >= total) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int channel = (part * kWarp + lane) * kLaneChannels;
      if (channel >= Codec::kWidth) continue;
      float x[kLaneChannels] = {};
      if (present[row]) loaded[row][part].decode(channel, x);
      store_eight(static_cast<T*>(rows.values) + (first + row) * Codec::kWidth + channel, x);
    }
  }
}

template <template <class> class Sources, class Params>
const char* launch_gather(CUstream_st* stream, const Pool& pool, const Rows& rows, const Params& params) {
  const int64_t total = rows.queries * rows.count;
  if (total == 0) return nullptr;
  with_codec(pool, [&](auto codec, auto alignment) {
    using Codec = decltype(codec);
    with_element(rows.element, [&](auto element) {
      gather_kernel<Codec, decltype(alignment)::value, decltype(element)>
          <<<blocks_for(total, kGatherWarps * rows_in_flight<Codec>()), kGatherWarps * kWarp, 0, stream>>>(
              rows, pool.global_scale, Sources<Codec>{params});
    });
  });
  return launch_error();
}

}  // namespace

const char* gather_entries(CUstream_st* stream, const GatherEntriesParams& params) {
  return launch_gather<EntrySources>(stream, params.pool, params.rows, params);
}

const char* gather_window(CUstream_st* stream, const GatherWindowParams& params) {
  return launch_gather<WindowSources>(stream, params.window, params.rows, params);
}

}  // namespace dsv4::cuda
