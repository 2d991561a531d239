// Stored rows read on the host: the gathers.

#include <algorithm>

#include "cpu/rows.h"
#include "layout/places.h"
#include "ops/signatures.h"

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

void gather_entries(const GatherEntriesParams& params) {
  const Rows& rows = params.rows;
  visit_codec(params.pool.width, params.pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    for (int64_t query = 0; query < rows.queries; ++query) {
      const EntryQuery from = params.indices != nullptr
                                  ? entries_of_token(params.plan, query, params.ratio)
                                  : entries_of_request(params.plan, query, params.table.slots, params.ratio);
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t out = query * rows.count + i;
        const int entry = params.indices == nullptr ? static_cast<int>(i) : params.indices[out];
        const bool exists = entry >= 0 && entry < from.visible;
        const EntryPlace place = exists ? place_of_entry(params.pool, params.table, *params.layer, from.slot, entry)
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
  visit_codec(window.width, window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    for (int64_t query = 0; query < rows.queries; ++query) {
      const WindowQuery from = window_of_request(params.plan, query, static_cast<int>(window.pages), params.before);
      for (int64_t i = 0; i < rows.count; ++i) {
        const WindowPlace place =
            place_in_window(window, params.positions, layer, from.slot, from.last - (rows.count - 1) + i);
        read_or_clear<Codec>(rows, query * rows.count + i, window, place.page, place.row, place.position);
      }
    }
  });
}

}  // namespace dsv4::cpu
