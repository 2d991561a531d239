// Which rows a token attends to, and where they are stored: window rows oldest first, then entries.
#pragma once

#include "layout/places.h"
#include "ops/params.h"

namespace dsv4 {

// One token's rows, by number: first those of the window, then entries. `valid` is false for padding, and for a token
// that is `lacking`: rows that it should see were overwritten by later tokens of its step, and nobody saved them.
struct AttendedRows {
  bool valid;
  bool lacking;
  int token;
  int slot;
  int position;
  int window_layer;
  int entries_layer;
  int ring_row;  // where the ring has the row of `position`
  int window;    // window rows that may exist: positions position - window + 1 .. position
  int entries;   // entries to look at: the chosen ones, or 0 .. entries - 1
  int visible;   // entry ids below this are visible
};

// Whether later tokens of the step may have taken the place of window rows that a token sees: not in a step whose
// requests bring no more tokens than the ring has rows to spare.
DSV4_HOST_DEVICE bool may_lack_rows(const AttendParams& params, int longest) {
  return params.displaced.data == nullptr && longest > params.window.rows - params.window_size + 1;
}

DSV4_HOST_DEVICE bool lacks_rows(const AttendParams& params, int index, int position) {
  const Token token = token_at(params.plan, index, static_cast<int>(params.window.pages));
  const int first = position < params.window_size ? 0 : position - params.window_size + 1;
  return token.valid && token.next - params.window.rows > first;
}

// What the device must load before a token's rows are known. No load waits for another.
struct PlannedToken {
  int slot;
  int position;
  int longest;
  int window_layer;
  int entries_layer;
};

DSV4_HOST_DEVICE PlannedToken planned_token(const AttendParams& params, int token) {
  return {params.plan.token_slot()[token], params.plan.token_position()[token], *params.plan.longest(),
          *params.window_layer, params.entries.data == nullptr ? -1 : *params.entries_layer};
}

DSV4_HOST_DEVICE AttendedRows attended_rows(const AttendParams& params, int token, const PlannedToken& planned) {
  AttendedRows rows{};
  rows.token = token;
  rows.slot = planned.slot, rows.position = planned.position;
  rows.window_layer = planned.window_layer, rows.entries_layer = planned.entries_layer;
  rows.valid = rows.slot >= 0 && rows.slot < params.window.pages && rows.position >= 0;
  rows.lacking = rows.valid && may_lack_rows(params, planned.longest) && lacks_rows(params, token, rows.position);
  rows.valid = rows.valid && !rows.lacking;
  if (!rows.valid) return rows;
  rows.ring_row = rows.position % params.window.rows;
  rows.window = rows.position < params.window_size ? rows.position + 1 : params.window_size;
  if (params.entries.data != nullptr) {
    rows.visible = (rows.position + 1) / params.ratio;
    const int seen = rows.visible < params.count ? rows.visible : params.count;
    rows.entries = params.indices == nullptr ? seen : params.count;
  }
  return rows;
}

DSV4_HOST_DEVICE AttendedRows attended_rows(const AttendParams& params, int token) {
  return attended_rows(params, token, planned_token(params, token));
}

// A row on its way from a number to an address, in three steps that each wait for one load. Someone who looks up
// several does the same step for all of them.
struct Lookup {
  int first;   // window: the position that its ring row holds; entries: the entry id
  int second;  // window: the position that its displaced row holds; entries: the block
};

DSV4_HOST_DEVICE int window_position(const AttendedRows& rows, int number) {
  return rows.position - rows.window + 1 + number;
}

// Its row of the ring, which is no smaller than the window.
DSV4_HOST_DEVICE int window_row(const AttendParams& params, const AttendedRows& rows, int number) {
  const int row = rows.ring_row - (rows.window - 1 - number);
  return row < 0 ? row + params.window.rows : row;
}

// The chosen entry of that number, below 0 where there is none.
DSV4_HOST_DEVICE int chosen_entry(const AttendParams& params, int token, int number) {
  return number < params.count ? params.indices[static_cast<int64_t>(token) * params.count + number] : -1;
}

DSV4_HOST_DEVICE void look_up_first(const AttendParams& params, const AttendedRows& rows, bool in_window, int number,
                                    Lookup& lookup) {
  lookup.first = -1;
  if (in_window) {
    if (number >= rows.window || rows.window_layer < 0 || rows.window_layer >= params.window.layers) return;
    const int64_t page = rows.window_layer * params.window.pages + rows.slot;
    lookup.first = params.window_positions[page * params.window.rows + window_row(params, rows, number)];
  } else if (number < rows.entries) {
    lookup.first = params.indices == nullptr ? number : chosen_entry(params, rows.token, number);
  }
}

DSV4_HOST_DEVICE int displaced_row(const AttendParams& params, const AttendedRows& rows, int position) {
  const int request = params.plan.token_request()[rows.token];
  if (request < 0 || request >= params.plan.requests) return -1;
  const int back = rows.position - position;  // from the token, in this request's rows
  return (params.window_size - 1) * (request + 1) + rows.token - back;
}

DSV4_HOST_DEVICE void look_up_second(const AttendParams& params, const AttendedRows& rows, bool in_window, int number,
                                     Lookup& lookup) {
  lookup.second = -1;
  if (in_window) {
    const int position = window_position(rows, number);
    if (params.displaced.data == nullptr || number >= rows.window || lookup.first == position) return;
    const int row = displaced_row(params, rows, position);
    if (row >= 0 && row < params.displaced.rows) lookup.second = params.displaced_positions[row];
  } else if (lookup.first >= 0 && lookup.first < rows.visible) {
    lookup.second = block_of_entry(params.entries, params.table, rows.slot, lookup.first);
  }
}

// The row's page and place, no page if there is none.
DSV4_HOST_DEVICE EntryPlace look_up_third(const AttendParams& params, const AttendedRows& rows, bool in_window,
                                          int number, const Lookup& lookup) {
  if (!in_window) {
    if (lookup.second < 0) return {nullptr, 0};  // without entries there is no layer of them either
    return place_in_block(params.entries, rows.entries_layer, lookup.second, lookup.first);
  }
  const int position = window_position(rows, number);
  if (number >= rows.window) return {nullptr, 0};
  if (lookup.first == position) {
    const int64_t page = rows.window_layer * params.window.pages + rows.slot;
    return {params.window.data + page * params.window.page_bytes, window_row(params, rows, number)};
  }
  if (lookup.second == position) return {params.displaced.data, displaced_row(params, rows, position)};
  return {nullptr, 0};
}

}  // namespace dsv4
