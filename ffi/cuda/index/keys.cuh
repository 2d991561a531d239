// Indexer keys as the first operand of Hopper's products: 16 a warp, from shared memory into registers.
//
// Which channel lies where in the reduction is free as long as keys and queries agree: a lane reads 16 neighbouring
// bytes of a row, and queries are stored in the order that follows. Each format says how many bytes a channel of the
// operands has, how a lane loads its part of two rows (g and g + 8), makes the operand's words of a step, and where
// channel `dim` of a query goes in a row of the second operand.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/core/permute.cuh"
#include "layout/codecs.h"

namespace dsv4::cuda::index {

constexpr int kWarpKeys = 16;  // keys of a warp's part of a tile
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ __forceinline__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ __forceinline__ uint32_t load4(const void* from) { return *static_cast<const uint32_t*>(from); }
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Makes the compiler have all words ready here: between the products it may not touch the registers that they read.
template <int N>
__device__ __forceinline__ void settle(uint32_t (&words)[2][N]) {
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) asm volatile("" : "+r"(words[i / N][i % N]));
}

// The larger of two numbers of 16 bits, twice.
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.u16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Two products of halves.
__device__ __forceinline__ uint32_t times_halves(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
constexpr uint32_t kHalvesOf128 = 0x58005800u;

// What follows from a codec: bytes of a row's data and scales.
template <class C>
struct KeysOf {
  using Codec = C;
  static constexpr int kRowBytes = Layout<C>::kDataBytes, kScaleBytes = Layout<C>::kScaleBytes;
};

// Byte offset of (step, half, lane column, byte) in a query row of operands of `kBytes` bytes.
template <int kBytes>
__device__ __forceinline__ int operand_offset(int step, int half, int column, int byte) {
  return step * 32 + half * 16 + column * 4 + byte;
}

// 128 E4M3, fp32 scale, as halves: sums of E4M3 products have too few bits where they cancel.
struct Fp8Keys : KeysOf<Fp8Pow2<kKeyDim>> {
  static constexpr int kBytes = 2, kSteps = 8, kApart = 1;
  static constexpr bool kPlain = false;
  struct Raw {
    uint4 data[2][2];
    float scale[2];
  };
  template <int kStageKeys>
  __device__ static void load(Raw& raw, const uint8_t* stage, int row, int column, float) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Odd rows the other way round: rows lie 128 bytes apart, and the banks of two would be the same.
      const int odd = row & 1;
      const uint8_t* at = stage + (row + 8 * r) * 128 + 16 * column;
      const uint4 one = load16(at + 64 * odd), other = load16(at + 64 * (1 - odd));
      raw.data[r][0] = odd != 0 ? other : one, raw.data[r][1] = odd != 0 ? one : other;
      raw.scale[r] = __uint_as_float(load4(stage + kStageKeys * 128 + (row + 8 * r) * 4));
    }
  }
  struct Tile {
    uint32_t words_[2][16];
    float scale_[2];
    __device__ explicit Tile(const Raw& raw, int, float) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale_[r] = raw.scale[r];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const uint32_t four = word_of(raw.data[r][i / 8], i % 8 / 2);
          words_[r][i] = halves_from_e4m3x2(static_cast<uint16_t>(four >> (i % 2 * 16)));
        }
      }
      settle(words_);
    }
    __device__ __forceinline__ void words(int step, uint32_t (&a)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words_[i & 1][2 * step + (i >> 1)];
    }
    __device__ __forceinline__ float scale(int r) const { return r == 0 ? scale_[0] : scale_[1]; }
  };
  __device__ static int offset_of(int dim) {
    const int column = dim % 64 / 16, pair = dim / 64 * 8 + dim % 16 / 2;
    return operand_offset<2>(pair / 2, pair % 2, column, 2 * (dim % 2));
  }
};

// The high bytes of the halves (which are E5M2 numbers) of E2M1's eight sizes.
constexpr uint32_t kSizesLow = 0x3E3C3800u, kSizesHigh = 0x46444240u;

// 128 E2M1, UE8M0 per 32: as E5M2, scales beside the row's largest. What is more than 2^13 below it counts as zero.
struct Mxfp4Keys : KeysOf<Mxfp4<kKeyDim>> {
  static constexpr int kBytes = 1, kSteps = 4;
  static constexpr bool kPlain = false;
  struct Raw {
    uint4 data[2];
    uint32_t scales[2];
  };
  template <int kStageKeys>
  __device__ static void load(Raw& raw, const uint8_t* stage, int row, int column, float) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      raw.data[r] = load16(stage + (row + 8 * r) * 64 + 16 * column);
      raw.scales[r] = load4(stage + kStageKeys * 64 + (row + 8 * r) * 4);
    }
  }
  struct Tile {
    uint32_t words_[2][8];
    float scale_[2];
    __device__ explicit Tile(const Raw& raw, int column, float) {
      // The largest scale of both rows: of 16 bits the high byte decides.
      const uint32_t first = __byte_perm(raw.scales[0], raw.scales[1], 0x5410),
                     second = __byte_perm(raw.scales[0], raw.scales[1], 0x7632);
      const uint32_t both = larger_pair(larger_pair(first, first << 8), larger_pair(second, second << 8));
      const uint32_t largest[2] = {both >> 8 & 0xFFu, both >> 24};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale_[r] = __uint_as_float(largest[r] << 23);
        // Powers of two under the row's largest; sizes that are zero stay so.
        const uint32_t below = largest[r] - __byte_perm(raw.scales[r], 0u, 0x4440 + column);
        const uint32_t low = below > 13u ? 0u : kSizesLow - below * 0x04040400u;
        const uint32_t high = below > 13u ? 0u : kSizesHigh - below * 0x04040404u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t w = word_of(raw.data[r], i), select = w & 0x77777777u, even = w << 4;
          // Bytes whose highest bits are the signs.
          const uint32_t signs[2] = {__byte_perm(even, w, 0x5140), __byte_perm(even, w, 0x7362)};
          words_[r][2 * i] = four_of_eight(low, high, select) | (signs[0] & 0x80808080u);
          words_[r][2 * i + 1] = four_of_eight(low, high, select >> 16) | (signs[1] & 0x80808080u);
        }
      }
      settle(words_);
    }
    __device__ __forceinline__ void words(int step, uint32_t (&a)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words_[i & 1][2 * step + (i >> 1)];
    }
    __device__ __forceinline__ float scale(int r) const { return r == 0 ? scale_[0] : scale_[1]; }
  };
  __device__ static int offset_of(int dim) { return operand_offset<1>(dim % 32 / 8, dim % 8 / 4, dim / 32, dim % 4); }
};

template <bool kRowScale>
struct Nvfp4Keys
    : KeysOf<std::conditional_t<kRowScale, Nvfp4<kKeyDim>, Nvfp4Static<kKeyDim>>> {  // 128 E2M1, E4M3 per 16, an fp32
                                                                                     // per row or for all: as halves
  static constexpr int kBytes = 2, kSteps = 8, kApart = 4;
  static constexpr bool kPlain = false;
  struct Raw {
    uint4 data[2];
    uint32_t scales[2];
    float scale[2];
  };
  template <int kStageKeys>
  __device__ static void load(Raw& raw, const uint8_t* stage, int row, int column, float global_scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      raw.data[r] = load16(stage + (row + 8 * r) * 64 + 16 * column);
      const uint8_t* scales = stage + kStageKeys * 64 + (row + 8 * r) * Nvfp4Keys::kScaleBytes;
      raw.scales[r] = load4(scales + 4 * (column / 2));
      raw.scale[r] = kRowScale ? __uint_as_float(load4(scales + 8)) : global_scale;
    }
  }
  struct Tile {
    uint32_t words_[2][16];
    float scale_[2];
    __device__ explicit Tile(const Raw& raw, int column, float) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale_[r] = raw.scale[r];
        const uint16_t codes = static_cast<uint16_t>(raw.scales[r] >> (16 * (column & 1)));
        uint32_t both;  // the scales of the two blocks of this lane's 32 channels
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(codes));
        both = times_halves(both, kHalvesOf128);
        const uint32_t of_block[2] = {__byte_perm(both, 0u, 0x1010), __byte_perm(both, 0u, 0x3232)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t w = word_of(raw.data[r], j);
          // Where the bits of a half's high byte lie, E2M1 numbers are halves 2^14 times smaller: keys come out 2^7
          // times smaller.
          const uint32_t even = (w << 4 & 0x80808080u) | (w << 1 & 0x0E0E0E0Eu),
                         odd = (w & 0x80808080u) | (w >> 3 & 0x0E0E0E0Eu);
          const uint32_t small[4] = {__byte_perm(even, 0u, 0x2404), __byte_perm(odd, 0u, 0x2404), even & 0xFF00FF00u,
                                     odd & 0xFF00FF00u};
#pragma unroll
          for (int i = 0; i < 4; ++i) words_[r][4 * j + i] = times_halves(small[i], of_block[j / 2]);
        }
      }
      settle(words_);
    }
    __device__ __forceinline__ void words(int step, uint32_t (&a)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words_[i & 1][2 * step + (i >> 1)];
    }
    __device__ __forceinline__ float scale(int r) const { return r == 0 ? scale_[0] : scale_[1]; }
  };
  // Pair p = 4 j + i of a lane holds channels 32 c + 8 j + i and that + 4.
  __device__ static int offset_of(int dim) {
    const int column = dim / 32, j = dim % 32 / 8, i = dim % 4, second = dim % 8 / 4, pair = 4 * j + i;
    return operand_offset<2>(pair / 2, pair % 2, column, 2 * second);
  }
};

struct Bf16Keys : KeysOf<Bf16<kKeyDim>> {
  static constexpr int kBytes = 2, kSteps = 8, kApart = 1;
  static constexpr bool kPlain = true;
  struct Raw {
    uint4 data[2][4];
  };
  template <int kStageKeys>
  __device__ static void load(Raw& raw, const uint8_t* stage, int row, int column, float) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int q = 0; q < 4; ++q) raw.data[r][q] = load16(stage + (row + 8 * r) * 256 + 64 * q + 16 * column);
  }
  struct Tile {
    Raw raw;
    __device__ explicit Tile(const Raw& from, int, float) : raw(from) {}
    __device__ __forceinline__ void words(int step, uint32_t (&a)[4]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = word_of(raw.data[i & 1][step / 2], 2 * (step % 2) + (i >> 1));
    }
    __device__ __forceinline__ float scale(int) const { return 1.0f; }
  };
  __device__ static int offset_of(int dim) {
    const int q = dim / 32, column = dim % 32 / 8, w = dim % 8 / 2;
    return operand_offset<2>(2 * q + w / 2, w % 2, column, 2 * (dim % 2));
  }
};

}  // namespace dsv4::cuda::index
