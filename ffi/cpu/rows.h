// One row in and out of its stored form, on the host.
#pragma once

#include <vector>

#include "layout/codecs.h"
#include "ops/params.h"

namespace dsv4::cpu {

template <class Codec>
void store_row(StoredRow stored, const float* x, float global_scale) {
  constexpr int kQuantized = Codec::kQuantized, kBlock = Codec::kBlock;
  const auto amax = [x](int first, int last) {
    float largest = 0.0f;
    for (int i = first; i < last; ++i) largest = max_ignoring_nan(largest, magnitude(x[i]));
    return clamp(largest, 0.0f, kFloatMax);
  };
  const float row_scale = Codec::row_scale(Codec::kNeedsRowAmax ? amax(0, kQuantized) : 0.0f, global_scale);
  store_row_scale<Codec>(stored.scales, row_scale);
  for (int channel = 0; channel < Codec::kWidth; channel += 4) {
    float scale = row_scale;
    if constexpr (kBlock != 0) {
      if (channel < kQuantized) {
        const int block = channel / kBlock;
        if (channel % kBlock == 0) stored.scales[block] = Codec::block_code(amax(channel, channel + kBlock), row_scale);
        scale = Codec::scale(stored.scales[block], row_scale);
      }
    }
    const float four[4] = {x[channel], x[channel + 1], x[channel + 2], x[channel + 3]};
    store_channels<Codec>(stored.data, channel, four, scale);
  }
}

template <class Codec, class T>
void load_row(StoredRow stored, T* x, float global_scale) {
  for (int channel = 0; channel < Codec::kWidth; channel += 4) {
    float four[4];
    load_channels<Codec>(stored.data, channel, four, load_scale<Codec>(stored.scales, channel, global_scale));
    for (int i = 0; i < 4; ++i) x[channel + i] = from_float<T>(four[i]);
  }
}

inline float element(const void* data, Element type, int64_t index) {
  return type == Element::kFloat32 ? static_cast<const float*>(data)[index]
                                   : to_float(static_cast<const bfloat16*>(data)[index]);
}

inline void load_floats(const void* data, Element type, int64_t first, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = element(data, type, first + i);
}

}  // namespace dsv4::cpu
