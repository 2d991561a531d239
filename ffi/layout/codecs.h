// Storage formats: for each codec its byte layout, its scales and the coding of a few consecutive channels.
//
// A page of P rows holds the data of every row (row i at kDataBytes * i), then the scales of every row
// (row i at kDataBytes * P + kScaleBytes * i). Within a row the first kQuantized channels are codes of kCodeBits bits;
// the others are plain values of type Plain. kBlock consecutive channels share one block scale (a byte each, in channel
// order); a row scale (fp32) follows the block scales where kStoresRowScale. dsv4_jax/layout/formats.py names the same
// layouts.
#pragma once

#include <string_view>
#include <type_traits>

#include "layout/bits.h"
#include "layout/kinds.h"

namespace dsv4 {

template <int W>
struct CodecBase {
  static constexpr int kWidth = W;
  static constexpr int kQuantized = 0;
  static constexpr int kCodeBits = 8;
  static constexpr int kBlock = 0;  // channels that share a block scale; 0: no block scales
  static constexpr bool kNeedsRowAmax = false;
  static constexpr bool kStoresRowScale = false;
  static constexpr int kPaddingScaleBytes = 0;
  static constexpr int kPageMultiple = 16;
  using Plain = bfloat16;

  DSV4_HOST_DEVICE static float row_scale(float /*row_amax*/, float /*global_scale*/) { return 1.0f; }
  DSV4_HOST_DEVICE static uint8_t block_code(float /*block_amax*/, float /*row_scale*/) { return 0; }
  DSV4_HOST_DEVICE static float scale(uint8_t /*block_code*/, float row_scale) { return row_scale; }
  DSV4_HOST_DEVICE static float in_units(float x, float scale) { return x / scale; }
};

template <int W>
struct Fp32 : CodecBase<W> {
  static constexpr const char* kName = "fp32";
  using Plain = float;
};

template <int W>
struct Bf16 : CodecBase<W> {
  static constexpr const char* kName = "bf16";
};

// 448 E4M3 codes with one fp32 scale per row; the 64 RoPE channels stay bfloat16.
template <int W>
struct Fp8 : CodecBase<W> {
  static constexpr const char* kName = "fp8";
  static constexpr int kQuantized = W - kRopeDim;
  static constexpr bool kNeedsRowAmax = true;
  static constexpr bool kStoresRowScale = true;

  DSV4_HOST_DEVICE static float row_scale(float row_amax, float /*global_scale*/) {
    return max_ignoring_nan(1e-12f, row_amax) / kE4m3Max;
  }
};

// FlashMLA's MODEL1: 448 E4M3 codes with a UE8M0 scale per 64; the 64 RoPE channels stay bfloat16.
template <int W>
struct Fp8DsMla : CodecBase<W> {
  static constexpr const char* kName = "fp8_ds_mla";
  static constexpr int kQuantized = W - kRopeDim;
  static constexpr int kBlock = 64;
  static constexpr int kPaddingScaleBytes = 1;
  static constexpr int kPageMultiple = 576;

  DSV4_HOST_DEVICE static uint8_t block_code(float block_amax, float /*row_scale*/) {
    return ceil_exponent(max_ignoring_nan(1e-4f, block_amax) / kE4m3Max);
  }
  DSV4_HOST_DEVICE static float scale(uint8_t block_code, float /*row_scale*/) { return power_of_two(block_code); }
  DSV4_HOST_DEVICE static float in_units(float x, float scale) { return x * inverse_power_of_two(scale); }
};

// E4M3 codes with one power-of-two fp32 scale per row (indexer keys).
template <int W>
struct Fp8Pow2 : CodecBase<W> {
  static constexpr const char* kName = "fp8_pow2";
  static constexpr int kQuantized = W;
  static constexpr bool kNeedsRowAmax = true;
  static constexpr bool kStoresRowScale = true;

  DSV4_HOST_DEVICE static float row_scale(float row_amax, float /*global_scale*/) {
    return power_of_two(ceil_exponent(max_ignoring_nan(1e-4f, row_amax) / kE4m3Max));
  }
  DSV4_HOST_DEVICE static float in_units(float x, float scale) { return x * inverse_power_of_two(scale); }
};

// NVFP4 with a constant global scale: E2M1 codes, an E4M3 scale per 16.
template <int W>
struct Nvfp4Static : CodecBase<W> {
  static constexpr const char* kName = "nvfp4_static";
  static constexpr int kQuantized = W;
  static constexpr int kCodeBits = 4;
  static constexpr int kBlock = 16;

  DSV4_HOST_DEVICE static float row_scale(float /*row_amax*/, float global_scale) { return global_scale; }
  DSV4_HOST_DEVICE static uint8_t block_code(float block_amax, float row_scale) {
    const float scale = clamp(block_amax / kE2m1Max / row_scale, 0.001953125f, kE4m3Max);
    return static_cast<uint8_t>(e4m3x2_from_float(scale, 0.0f));
  }
  DSV4_HOST_DEVICE static float scale(uint8_t block_code, float row_scale) {
    return float_from_e4m3(block_code) * row_scale;
  }
};

// NVFP4 with a global scale per row, stored behind the block scales.
template <int W>
struct Nvfp4 : Nvfp4Static<W> {
  static constexpr const char* kName = "nvfp4";
  static constexpr bool kNeedsRowAmax = true;
  static constexpr bool kStoresRowScale = true;

  DSV4_HOST_DEVICE static float row_scale(float row_amax, float /*global_scale*/) {
    constexpr float kFloor = 7.888609052210118e-31f;  // 2^-100
    return max_ignoring_nan(kFloor, row_amax) / (kE2m1Max * kE4m3Max);
  }
};

// MXFP4: E2M1 codes, a UE8M0 scale per 32, rounded up so that nothing saturates.
template <int W>
struct Mxfp4 : CodecBase<W> {
  static constexpr const char* kName = "mxfp4";
  static constexpr int kQuantized = W;
  static constexpr int kCodeBits = 4;
  static constexpr int kBlock = 32;

  DSV4_HOST_DEVICE static uint8_t block_code(float block_amax, float /*row_scale*/) {
    constexpr float kFloor = 7.052966104933725e-38f;  // 6 * 2^-126
    return ceil_exponent(max_ignoring_nan(kFloor, block_amax) / kE2m1Max);
  }
  DSV4_HOST_DEVICE static float scale(uint8_t block_code, float /*row_scale*/) { return power_of_two(block_code); }
  DSV4_HOST_DEVICE static float in_units(float x, float scale) { return x * inverse_power_of_two(scale); }
};

// Sizes and offsets that follow from a codec's constants.
template <class Codec>
struct Layout {
  static constexpr int kCodeBytes = Codec::kQuantized * Codec::kCodeBits / 8;
  static constexpr int kDataBytes =
      kCodeBytes + (Codec::kWidth - Codec::kQuantized) * static_cast<int>(sizeof(typename Codec::Plain));
  static constexpr int kBlocks = Codec::kBlock == 0 ? 0 : Codec::kQuantized / Codec::kBlock;
  static constexpr int kScaleBytes =
      kBlocks + Codec::kPaddingScaleBytes + (Codec::kStoresRowScale ? static_cast<int>(sizeof(float)) : 0);

  static_assert(kDataBytes % 16 == 0 && Codec::kPageMultiple % 16 == 0, "rows lie at multiples of 16 bytes");

  DSV4_HOST_DEVICE static int64_t page_bytes(int64_t rows) {
    const int64_t bytes = rows * (kDataBytes + kScaleBytes);
    return (bytes + Codec::kPageMultiple - 1) / Codec::kPageMultiple * Codec::kPageMultiple;
  }
};

// One row within its page.
struct StoredRow {
  uint8_t* data;
  uint8_t* scales;
};

template <class Codec>
DSV4_HOST_DEVICE StoredRow stored_row(uint8_t* page, int64_t rows, int64_t row) {
  using L = Layout<Codec>;
  return {page + row * L::kDataBytes, page + rows * L::kDataBytes + row * L::kScaleBytes};
}

// Copies between a page and an aligned local value, in words of up to 16 bytes: channels begin at multiples of what is
// copied at once, rows and pages at multiples of 16 bytes.
template <int kBytes>
DSV4_HOST_DEVICE void copy_words(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  constexpr int kWord = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes % kWord == 0, "a whole number of words");
  using Word = std::conditional_t<
      kWord == 16, uint4,
      std::conditional_t<kWord == 8, uint2,
                         std::conditional_t<kWord == 4, uint32_t, std::conditional_t<kWord == 2, uint16_t, uint8_t>>>>;
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
#else
  memcpy(to, from, kBytes);
#endif
}

// Codes N (2 or 4) consecutive channels, `scale` being that of their block.
template <class Codec, int N>
DSV4_HOST_DEVICE void store_channels(uint8_t* data, int channel, const float (&x)[N], float scale) {
  if (Codec::kQuantized == 0 || channel >= Codec::kQuantized) {
    using Plain = typename Codec::Plain;
    alignas(16) Plain plain[N];
    for (int i = 0; i < N; ++i) plain[i] = from_float<Plain>(x[i]);
    const int offset = Layout<Codec>::kCodeBytes + (channel - Codec::kQuantized) * static_cast<int>(sizeof(Plain));
    copy_words<sizeof plain>(data + offset, plain);
  } else if constexpr (Codec::kCodeBits == 8) {
    alignas(4) uint16_t codes[N / 2];
    for (int i = 0; i < N; i += 2) {
      codes[i / 2] = e4m3x2_from_float(Codec::in_units(x[i], scale), Codec::in_units(x[i + 1], scale));
    }
    copy_words<sizeof codes>(data + channel, codes);
  } else {
    using Packed = std::conditional_t<N == 4, uint16_t, uint8_t>;
    uint32_t codes = 0;
    for (int i = 0; i < N; ++i) codes |= e2m1_from_float(Codec::in_units(x[i], scale)) << (4 * i);
    const Packed packed = static_cast<Packed>(codes);
    copy_words<sizeof packed>(data + channel / 2, &packed);
  }
}

// The inverse of store_channels.
template <class Codec>
DSV4_HOST_DEVICE void load_channels(const uint8_t* data, int channel, float (&x)[4], float scale) {
  if (channel >= Codec::kQuantized) {
    using Plain = typename Codec::Plain;
    alignas(16) Plain four[4];
    const int offset = Layout<Codec>::kCodeBytes + (channel - Codec::kQuantized) * static_cast<int>(sizeof(Plain));
    copy_words<sizeof four>(four, data + offset);
    for (int i = 0; i < 4; ++i) x[i] = to_float(four[i]);
  } else if constexpr (Codec::kCodeBits == 8) {
    uint32_t codes;
    copy_words<sizeof codes>(&codes, data + channel);
    for (int i = 0; i < 4; ++i) x[i] = float_from_e4m3(static_cast<uint8_t>(codes >> (8 * i))) * scale;
  } else {
    uint16_t codes;
    copy_words<sizeof codes>(&codes, data + channel / 2);
    for (int i = 0; i < 4; ++i) x[i] = float_from_e2m1((codes >> (4 * i)) & 15u) * scale;
  }
}

// Scales of a row: written and read by whoever owns the block (or row).
template <class Codec>
DSV4_HOST_DEVICE void store_row_scale(uint8_t* scales, float row_scale) {
  using L = Layout<Codec>;
  if constexpr (Codec::kStoresRowScale) copy_words<4>(scales + L::kBlocks, &row_scale);
  for (int i = 0; i < Codec::kPaddingScaleBytes; ++i) scales[L::kBlocks + i] = 0;
}

// A channel's scale as stored: what is loaded, apart from what is computed of it.
struct StoredScale {
  float row_scale;
  uint8_t block_code;
};

template <class Codec>
DSV4_HOST_DEVICE StoredScale load_stored_scale(const uint8_t* scales, int channel, float global_scale) {
  using L = Layout<Codec>;
  StoredScale stored{Codec::row_scale(0.0f, global_scale), 0};
  if constexpr (Codec::kStoresRowScale) copy_words<4>(&stored.row_scale, scales + L::kBlocks);
  if constexpr (Codec::kBlock != 0) {
    if (channel < Codec::kQuantized) stored.block_code = scales[channel / Codec::kBlock];
  }
  return stored;
}

template <class Codec>
DSV4_HOST_DEVICE float load_scale(const uint8_t* scales, int channel, float global_scale) {
  const StoredScale stored = load_stored_scale<Codec>(scales, channel, global_scale);
  return Codec::scale(stored.block_code, stored.row_scale);
}

template <class... Codecs>
struct CodecList {};

using HeadCodecs = CodecList<Fp32<kHeadDim>, Bf16<kHeadDim>, Fp8<kHeadDim>, Fp8DsMla<kHeadDim>, Nvfp4<kHeadDim>,
                             Nvfp4Static<kHeadDim>>;
using KeyCodecs =
    CodecList<Fp32<kKeyDim>, Bf16<kKeyDim>, Fp8Pow2<kKeyDim>, Nvfp4<kKeyDim>, Nvfp4Static<kKeyDim>, Mxfp4<kKeyDim>>;

// Those of sliding-window rows, which are written too often to be worth 4 bits.
using WindowCodecs = CodecList<Fp32<kHeadDim>, Bf16<kHeadDim>, Fp8<kHeadDim>, Fp8DsMla<kHeadDim>>;

// Calls `visit(Codec{})` for the codec at that place of the list.
template <class... Codecs, class Visitor>
void visit_codec(CodecList<Codecs...>, int index, Visitor&& visit) {
  int place = 0;
  static_cast<void>(((place++ == index ? (visit(Codecs{}), true) : false) || ...));
}

// Likewise, of the codecs for rows of that width: a pool's `width` and `codec`.
template <class Visitor>
void visit_codec(int width, int index, Visitor&& visit) {
  width == kHeadDim ? visit_codec(HeadCodecs{}, index, visit) : visit_codec(KeyCodecs{}, index, visit);
}

template <class... Codecs>
int find_codec(CodecList<Codecs...>, const char* name, size_t length) {
  int place = 0, found = -1;
  ((found = strlen(Codecs::kName) == length && memcmp(Codecs::kName, name, length) == 0 ? place : found, ++place), ...);
  return found;
}

inline bool is_window_codec(std::string_view name) { return find_codec(WindowCodecs{}, name.data(), name.size()) >= 0; }

// The codec of that name for rows of that width, -1 if there is none.
inline int find_codec(const char* name, size_t length, int width) {
  if (width == kHeadDim) return find_codec(HeadCodecs{}, name, length);
  return width == kKeyDim ? find_codec(KeyCodecs{}, name, length) : -1;
}

}  // namespace dsv4
