// Rows into and out of pools on the host: flush, the gathers, quantize and dequantize.

#include <algorithm>

#include "cpu/rows.h"
#include "layout/places.h"
#include "ops/kernels.h"

namespace dsv4::cpu {
namespace {

// Reads a stored row into output row `out`, or writes zeros and marks it invalid where there is none.
template <class Codec>
void read_or_clear(const Rows& rows, int64_t out, const Pool& pool, const uint8_t* page, int64_t page_row,
                   int position) {
  const bool valid = page != nullptr;
  rows.positions[out] = valid ? position : -1;
  rows.valid[out] = valid;
  const auto write = [&](auto* values) {
    auto* to = values + out * Codec::kWidth;
    if (valid) {
      load_row<Codec>(stored_row<Codec>(const_cast<uint8_t*>(page), pool.rows, page_row), to, pool.global_scale);
    } else {
      std::fill_n(to, Codec::kWidth, std::decay_t<decltype(*to)>{});
    }
  };
  if (rows.element == Element::kFloat32) {
    write(static_cast<float*>(rows.values));
  } else {
    write(static_cast<bfloat16*>(rows.values));
  }
}

}  // namespace

void flush(const FlushParams& params) {
  with_codec(params.pool, [&](auto codec) {
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

void gather_entries(const GatherEntriesParams& params) {
  const Rows& rows = params.rows;
  with_codec(params.pool, [&](auto codec) {
    using Codec = decltype(codec);
    for (int64_t query = 0; query < rows.queries; ++query) {
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t out = query * rows.count + i;
        const int entry = params.indices == nullptr ? static_cast<int>(i) : params.indices[out];
        const bool exists = entry >= 0 && entry < params.counts[query];
        const EntryPlace place =
            exists ? place_of_entry(params.pool, params.table, *params.layer, params.slots[query], entry)
                   : EntryPlace{nullptr, 0};
        read_or_clear<Codec>(rows, out, params.pool, place.page, place.row, exists ? entry * params.ratio : -1);
      }
    }
  });
}

void gather_window(const GatherWindowParams& params) {
  const Rows& rows = params.rows;
  const Pool& window = params.window;
  const int64_t layer = *params.layer;
  with_codec(window, [&](auto codec) {
    using Codec = decltype(codec);
    for (int64_t query = 0; query < rows.queries; ++query) {
      for (int64_t i = 0; i < rows.count; ++i) {
        const WindowPlace place = place_in_window(window, params.positions, layer, params.slots[query],
                                                  params.last[query] - (rows.count - 1) + i);
        read_or_clear<Codec>(rows, query * rows.count + i, window, place.page, place.row, place.position);
      }
    }
  });
}

void quantize(const QuantizeParams& params) {
  with_codec(params.page, [&](auto codec) {
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
  with_codec(params.page, [&](auto codec) {
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
