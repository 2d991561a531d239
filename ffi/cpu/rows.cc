// Rows stored on the host: flush, quantize and dequantize.

#include <algorithm>

#include "cpu/rows.h"
#include "layout/places.h"
#include "ops/signatures.h"

namespace dsv4::cpu {
void flush(const FlushParams& params) {
  visit_codec(params.pool.width, params.pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    for (int row = 0; row < params.closing; ++row) {
      const int index = params.plan.closing(params.ratio)[row];
      const Token closing = token_at(params.plan, index, params.table.slots);
      const EntryPlace place =
          place_of_entry(params.pool, params.table, *params.layer, closing.slot, closing.position / params.ratio);
      if (!closing.valid || place.page == nullptr) continue;
      store_row<Codec>(stored_row<Codec>(place.page, params.pool.rows, place.row),
                       params.entries + static_cast<int64_t>(row) * Codec::kWidth, params.pool.global_scale);
    }
  });
}

void quantize(const QuantizeParams& params) {
  visit_codec(params.page.width, params.page.codec, [&](auto codec) {
    using Codec = decltype(codec);
    float row[Codec::kWidth];
    for (int64_t i = 0; i < params.page.rows; ++i) {
      load_floats(params.rows, params.element, i * Codec::kWidth, Codec::kWidth, row);
      store_row<Codec>(stored_row<Codec>(params.page.data, params.page.rows, i), row, params.page.global_scale);
    }
    uint8_t* end = params.page.data + params.page.page_bytes;
    std::fill(params.page.data + params.page.rows * (Layout<Codec>::kDataBytes + Layout<Codec>::kScaleBytes), end,
              uint8_t{0});
  });
}

void dequantize(const QuantizeParams& params) {
  visit_codec(params.page.width, params.page.codec, [&](auto codec) {
    using Codec = decltype(codec);
    for (int64_t i = 0; i < params.page.rows; ++i) {
      const StoredRow stored = stored_row<Codec>(params.page.data, params.page.rows, i);
      if (params.element == Element::kFloat32) {
        load_row<Codec>(stored, static_cast<float*>(params.rows) + i * Codec::kWidth, params.page.global_scale);
      } else {
        load_row<Codec>(stored, static_cast<bfloat16*>(params.rows) + i * Codec::kWidth, params.page.global_scale);
      }
    }
  });
}

}  // namespace dsv4::cpu
