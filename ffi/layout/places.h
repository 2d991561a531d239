// Where a stored row lives: an entry through the block table, a window row through its recorded position. Addresses are
// 64-bit.
#pragma once

#include "ops/params.h"

namespace dsv4 {

// A row within a page; `page` is null where there is no such row.
struct EntryPlace {
  uint8_t* page;
  int row;
};

// The block that holds an entry of a slot; below 0 where there is none.
DSV4_HOST_DEVICE int block_of_entry(const Pool& pool, const BlockTable& table, int64_t slot, int entry) {
  if (slot < 0 || slot >= table.slots || entry < 0) return -1;
  const int index = static_cast<int>(static_cast<unsigned>(entry) / static_cast<unsigned>(pool.rows));
  if (index >= table.max_blocks) return -1;
  return table.data[slot * table.max_blocks + index];
}

// An entry that is there, in a block that a table names.
DSV4_HOST_DEVICE EntryPlace place_in_block(const Pool& pool, int64_t layer, int64_t block, int entry) {
  if (layer < 0 || layer >= pool.layers || block < 0 || block >= pool.pages) return {nullptr, 0};
  return {pool.data + (layer * pool.pages + block) * pool.page_bytes,
          static_cast<int>(static_cast<unsigned>(entry) % static_cast<unsigned>(pool.rows))};
}

DSV4_HOST_DEVICE EntryPlace place_of_entry(const Pool& pool, const BlockTable& table, int64_t layer, int64_t slot,
                                           int entry) {
  return place_in_block(pool, layer, block_of_entry(pool, table, slot, entry), entry);
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

// Whose entries a query of a gather reads, and how many of them it sees; slot -1 where it sees nothing.
struct EntryQuery {
  int slot;
  int visible;
};

// A token sees the entries that are closed once it is there.
DSV4_HOST_DEVICE EntryQuery entries_of_token(const Plan& plan, int64_t token, int ratio) {
  return {plan.token_slot()[token], (plan.token_position()[token] + 1) / ratio};
}

// A request has what its last token sees.
DSV4_HOST_DEVICE EntryQuery entries_of_request(const Plan& plan, int64_t index, int slots, int ratio) {
  const Request request = request_at(plan, static_cast<int>(index), slots);
  return {request.valid ? request.slot : -1, request.next / ratio};
}

// The slot and the position of the newest of the window rows that a request reads: its last token's, or, before the
// step's rows are stored, that of the token before its first.
struct WindowQuery {
  int slot;
  int last;
};

DSV4_HOST_DEVICE WindowQuery window_of_request(const Plan& plan, int64_t index, int slots, bool before) {
  const Request request = request_at(plan, static_cast<int>(index), slots);
  return {request.valid ? request.slot : -1, (before ? request.start : request.next) - 1};
}

}  // namespace dsv4
