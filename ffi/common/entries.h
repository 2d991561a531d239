// Where a stored row lives: an entry through the block table, a window row through its recorded position. Addresses are 64-bit.
#pragma once

#include "params.h"

namespace dsv4 {

// A row within a page; `page` is null where there is no such row.
struct EntryPlace {
  uint8_t* page;
  int row;
};

DSV4_HOST_DEVICE EntryPlace place_of_entry(const Pool& pool, const BlockTable& table, int64_t layer, int64_t slot, int entry) {
  const EntryPlace nowhere{nullptr, 0};
  if (layer < 0 || layer >= pool.layers || slot < 0 || slot >= table.slots || entry < 0) return nowhere;
  const int index = entry / pool.rows;
  if (index >= table.max_blocks) return nowhere;
  const int64_t block = table.data[slot * table.max_blocks + index];
  if (block < 0 || block >= pool.pages) return nowhere;
  return {pool.data + (layer * pool.pages + block) * pool.page_bytes, entry % pool.rows};
}

struct WindowPlace {
  uint8_t* page;
  int row;
  int position;
};

DSV4_HOST_DEVICE WindowPlace place_in_window(const Pool& window, const int32_t* positions, int64_t layer, int64_t slot,
                                             int64_t position) {
  const WindowPlace nowhere{nullptr, 0, -1};
  if (layer < 0 || layer >= window.layers || slot < 0 || slot >= window.pages || position < 0) return nowhere;
  const int row = static_cast<int>(position % window.rows);
  const int64_t page = layer * window.pages + slot;
  if (positions[page * window.rows + row] != position) return nowhere;
  return {window.data + page * window.page_bytes, row, static_cast<int>(position)};
}

}  // namespace dsv4
