// Stored rows on their way into tiles of bfloat16: what a warp loads of eight rows, and how it is decoded.
//
// A tile holds rows in units of their own scale: code values, exact in bfloat16, of a row whose fp32 scale is applied
// to its logit and to its weight instead. The RoPE channels of `fp8`, which the scale does not cover, lie there as they
// are (`kTailApart`): products with them are taken apart from those with codes.
#pragma once

#include <type_traits>

#include "cuda/attend/barriers.cuh"
#include "cuda/attend/wgmma.cuh"
#include "cuda/core/permute.cuh"
#include "layout/attended.h"
#include "layout/codecs.h"

namespace dsv4::cuda::attention {

constexpr int kTileRows = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;  // 64 channels of 64 keys
constexpr int kWarpRows = 8;
constexpr unsigned kAll = 0xFFFFFFFFu;

// Where unit u (16 bytes, 8 channels) of a key's row lies from the start of its tiles.
__device__ __forceinline__ uint32_t unit_offset(int key, int unit) {
  return unit / 8 * kTileBytes + key * kTileRowBytes + ((unit % 8 ^ key % 8) << 4);
}

// The place of the unit 2 k after one of the first two of a row.
__device__ __forceinline__ uint32_t two_units_on(uint32_t place, int k) { return place ^ k << 5; }

// A stored row: where, and of its scales what a decoder wants.
struct RowSource {
  const uint8_t* data;
  uint2 scale;
};

// What is read in place of a row that does not exist: zeros in every format.
__device__ const uint4 kNoRow[kHeadDim * 2 / 16] = {};

// 16 bytes of a row. They go by way of L1: it is small beside that much shared memory, yet without it half as many
// loads are on their way at once.
__device__ __forceinline__ uint4 load_unit(const uint8_t* from) {
  uint4 x;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
}

__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// The same bfloat16 twice: 2^(exponent - 127).
__device__ __forceinline__ uint32_t twice_power(int exponent) {
  return static_cast<uint32_t>(exponent << 7) * 0x10001u;
}

constexpr int kE4m3Bias =
    120;  // an E4M3 code at a bfloat16's lowest exponent and highest mantissa bits is 2^-120 of it

// Two neighbouring E4M3 codes of a word, pair 0 or 1, as bfloat16 times 2^-120.
__device__ __forceinline__ uint32_t small_e4m3(uint32_t codes, int pair) {
  const uint32_t high = __byte_perm(codes, 0u, pair == 0 ? 0x1404 : 0x3424);
  return (high & 0x80008000u) | (high >> 4 & 0x07F007F0u);
}

// Sixteen E4M3 codes times a factor (2^120 and the scale, twice).
__device__ __forceinline__ void decode_e4m3(const uint4& codes, uint32_t factor, uint4& first, uint4& second) {
  first = {multiply(small_e4m3(codes.x, 0), factor), multiply(small_e4m3(codes.x, 1), factor),
           multiply(small_e4m3(codes.y, 0), factor), multiply(small_e4m3(codes.y, 1), factor)};
  second = {multiply(small_e4m3(codes.z, 0), factor), multiply(small_e4m3(codes.z, 1), factor),
            multiply(small_e4m3(codes.w, 0), factor), multiply(small_e4m3(codes.w, 1), factor)};
}

// Eight E2M1 codes times a factor: four at a time select bytes of the eight magnitudes as bfloat16. Of 0x80 a negative
// code selects 0xFF, whose lowest bit tells it from others.
__device__ __forceinline__ uint4 decode_e2m1(uint32_t codes, uint32_t factor) {
  constexpr uint32_t kHigh[2] = {0x3F3F3F00u, 0x40404040u}, kLow[2] = {0xC0800000u, 0xC0804000u};
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t four = codes >> (16 * i), magnitudes = four & 0x7777u;
    const uint32_t signs = four_of_eight(0x80808080u, 0x80808080u, four) << 7;
    const uint32_t high = four_of_eight(kHigh[0], kHigh[1], magnitudes) | (signs & 0x80808080u);
    const uint32_t low = four_of_eight(kLow[0], kLow[1], magnitudes);
    pairs[2 * i] = multiply(four_of_eight(low, high, 0x5140), factor);
    pairs[2 * i + 1] = multiply(four_of_eight(low, high, 0x7362), factor);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ uint32_t two_bfloat16(float a, float b) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}

__device__ __forceinline__ uint32_t scaled(uint32_t pair, float first, float second) {
  return two_bfloat16(__uint_as_float(pair << 16) * first, __uint_as_float(pair & 0xFFFF0000u) * second);
}

// A decoder wants the scale to decode, or leaves it to logits and weights (`kByScale`). It moves rows in kUnits rounds,
// four lanes to a row: `fetch` loads round j, `put` decodes what was fetched into the row's place of the tiles; after
// the put of a round the next row's same round may be fetched. In every round eight neighbouring lanes, of two rows,
// write to different banks.
template <class Codec>
struct Decoder;

// Where a lane writes: unit 0 of its row, its row within a group of eight, and which of the row's four lanes it is.
struct RowPlace {
  uint32_t start;
  int row;
  int quarter;

  __device__ __forceinline__ uint32_t unit(int tile, int unit_in_tile) const {
    return start + tile * kTileBytes + ((unit_in_tile ^ row) << 4);
  }
};

// E4M3 codes and a bfloat16 tail of 64 channels. A round of codes fills one tile.
template <class Codes>
struct E4m3Decoder {
  static constexpr bool kCopies = false;
  static constexpr int kCodeUnits = 7, kUnits = 9;
  struct Raw {
    uint4 units[kUnits];
  };

  __device__ __forceinline__ static void fetch(const RowSource& row, int quarter, int j, Raw& raw) {
    const int from =
        j < kCodeUnits ? (4 * j + quarter) * 16 : 16 * 4 * kCodeUnits + (2 * quarter + j - kCodeUnits) * 16;
    raw.units[j] = load_unit(row.data + from);
  }

  __device__ __forceinline__ static void put(const RowSource& row, int j, const Raw& raw, const RowPlace& to) {
    if (j < kCodeUnits) {
      uint4 low, high;
      Codes::decode(row, j, raw.units[j], low, high);
      store_16(to.unit(j, 2 * to.quarter), low);
      store_16(to.unit(j, 2 * to.quarter + 1), high);
    } else {
      store_16(to.unit(7, 2 * to.quarter + j - kCodeUnits), raw.units[j]);
    }
  }
};

struct Fp8Codes {
  __device__ __forceinline__ static void decode(const RowSource&, int, const uint4& raw, uint4& low, uint4& high) {
    decode_e4m3(raw, twice_power(127 + kE4m3Bias), low, high);
  }
};

struct Fp8DsMlaCodes {
  // 64 channels, those of a tile, share a scale.
  __device__ __forceinline__ static void decode(const RowSource& row, int block, const uint4& raw, uint4& low,
                                                uint4& high) {
    const uint32_t four = block < 4 ? row.scale.x : row.scale.y;
    const int exponent = static_cast<int>(four >> (8 * (block % 4)) & 0xFFu) + kE4m3Bias;
    decode_e4m3(raw, twice_power(min(exponent, 254)), low, high);
    if (exponent > 254) {
      const uint32_t rest = twice_power(127 + exponent - 254);
      low = {multiply(low.x, rest), multiply(low.y, rest), multiply(low.z, rest), multiply(low.w, rest)};
      high = {multiply(high.x, rest), multiply(high.y, rest), multiply(high.z, rest), multiply(high.w, rest)};
    }
  }
};

template <>
struct Decoder<Fp8<kHeadDim>> : E4m3Decoder<Fp8Codes> {
  static constexpr bool kTailApart = true, kByScale = false;
  __device__ __forceinline__ static uint2 scale(const StoredRow& row, float) {
    return {*reinterpret_cast<const uint32_t*>(row.scales), 0u};
  }
  __device__ __forceinline__ static float row_scale(const RowSource& row) { return __uint_as_float(row.scale.x); }
};

template <>
struct Decoder<Fp8DsMla<kHeadDim>> : E4m3Decoder<Fp8DsMlaCodes> {
  static constexpr bool kTailApart = false, kByScale = true;
  __device__ __forceinline__ static uint2 scale(const StoredRow& row, float) {
    return *reinterpret_cast<const uint2*>(row.scales);
  }
  __device__ __forceinline__ static float row_scale(const RowSource&) { return 1.0f; }
};

// E2M1 codes with an E4M3 scale per 16, which lie scale.y bytes behind them; a lane's 32 codes are half a tile's row.
struct E2m1Decoder {
  static constexpr bool kCopies = false;
  static constexpr bool kTailApart = false, kByScale = false;
  static constexpr int kUnits = 4;
  struct Raw {
    uint4 codes[kUnits];
    uint2 scales;  // those of units 4 quarter .. 4 quarter + 3, two each
  };

  __device__ __forceinline__ static void fetch(const RowSource& row, int quarter, int j, Raw& raw) {
    raw.codes[j] = load_unit(row.data + (4 * j + quarter) * 16);
    if (j < kUnits - 1) return;
    const auto* scales = reinterpret_cast<const uint32_t*>(row.data + row.scale.y) + 2 * quarter;
    raw.scales = {__ldg(scales), __ldg(scales + 1)};
  }

  __device__ __forceinline__ static void put(const RowSource&, int j, const Raw& raw, const RowPlace& to) {
    // The scales of unit 4 j + quarter are with the row's lane j, in one of two words.
    const uint32_t x = __shfl_sync(kAll, raw.scales.x, j, 4), y = __shfl_sync(kAll, raw.scales.y, j, 4);
    const uint32_t factors = multiply(small_e4m3(to.quarter < 2 ? x : y, to.quarter % 2), twice_power(127 + kE4m3Bias));
    const uint32_t first = __byte_perm(factors, 0u, 0x1010), second = __byte_perm(factors, 0u, 0x3232);
    const uint4& codes = raw.codes[j];
    const uint4 decoded[4] = {decode_e2m1(codes.x, first), decode_e2m1(codes.y, first), decode_e2m1(codes.z, second),
                              decode_e2m1(codes.w, second)};
    // Lanes of the upper half begin with their last two units: they write to a second tile, at the same places.
    const bool swap = to.quarter >= 2;
    const int tile = 2 * j + to.quarter / 2, unit = to.quarter % 2 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_16(to.unit(tile, unit + (swap ? i ^ 2 : i)), swap ? decoded[i ^ 2] : decoded[i]);
    }
  }
};

template <>
struct Decoder<Nvfp4<kHeadDim>> : E2m1Decoder {
  __device__ __forceinline__ static uint2 scale(const StoredRow& row, float) {
    return {*reinterpret_cast<const uint32_t*>(row.scales + 32), static_cast<uint32_t>(row.scales - row.data)};
  }
  __device__ __forceinline__ static float row_scale(const RowSource& row) { return __uint_as_float(row.scale.x); }
};

template <>
struct Decoder<Nvfp4Static<kHeadDim>> : E2m1Decoder {
  __device__ __forceinline__ static uint2 scale(const StoredRow& row, float global_scale) {
    return {__float_as_uint(global_scale), static_cast<uint32_t>(row.scales - row.data)};
  }
  __device__ __forceinline__ static float row_scale(const RowSource& row) { return __uint_as_float(row.scale.x); }
};

// bfloat16 rows are copied past the registers, a whole warp to a row.
template <>
struct Decoder<Bf16<kHeadDim>> {
  static constexpr bool kCopies = true;
  static constexpr bool kTailApart = false, kByScale = false;
  struct Raw {};

  __device__ __forceinline__ static uint2 scale(const StoredRow&, float) { return {0u, 0u}; }
  __device__ __forceinline__ static float row_scale(const RowSource&) { return 1.0f; }

  // `to` is the row's unit 0, `row` its place among eight.
  __device__ __forceinline__ static void copy(const uint8_t* data, int lane, uint32_t to, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = i * 32 + lane;
      copy_async(to + unit / 8 * kTileBytes + ((unit % 8 ^ row) << 4), data + unit * 16, true);
    }
  }
};

}  // namespace dsv4::cuda::attention
