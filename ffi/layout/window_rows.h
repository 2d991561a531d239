// Where each row of a closing window comes from: this step's projections, the tail, or nothing (before the first
// token).
#pragma once

#include "ops/params.h"

namespace dsv4 {

DSV4_HOST_DEVICE float* tail_row(const Tail& tail, int64_t layer, int slot, int stream, int row) {
  const int64_t request = (layer * tail.slots + slot) * 2 + stream;
  return tail.data + (request * tail.geometry.rows() + row) * tail.width;
}

// A running tail's state of a request's open window: [3 (max, denominator, sum), width]. It means nothing until the
// window's first token was folded in.
DSV4_HOST_DEVICE float* running_state(const Tail& tail, int64_t layer, int slot) {
  return tail.data + (layer * tail.slots + slot) * 3 * tail.width;
}

// The tokens that a step brings to a window of 128, for a running tail.
struct WindowTokens {
  bool resumes;  // whether earlier steps brought tokens too, so that the state counts
  int index;     // of the first in the step
  int position;  // of the first
  int count;
};

// Those up to the token at `position`, which is token `index` of the step, of a request whose step begins at `start`.
DSV4_HOST_DEVICE WindowTokens window_tokens(int start, int position, int index) {
  const int window = position / kHcaRatio * kHcaRatio;
  const int first = start > window ? start : window;
  return {start > window, index - (position - first), first, position - first + 1};
}

// Rows that an entry pools: the window itself, and with overlap the window before it.
DSV4_HOST_DEVICE int pooled_rows(const TailGeometry& geometry) {
  return geometry.overlaps() ? 2 * geometry.ratio : geometry.ratio;
}

struct WindowRow {
  enum Source { kNothing, kStep, kTail } source;
  int64_t projection;     // kStep: offset of the row's first channel in kv and gate
  int64_t position_bias;  // kStep: the same in position_bias
  int tail_row;           // kTail
};

// Row `row` (oldest first) of the window closed by token `index` of the step.
DSV4_HOST_DEVICE WindowRow window_row(const Tail& tail, int columns, const Token& closing, int index, int row) {
  const TailGeometry& geometry = tail.geometry;
  const int back = pooled_rows(geometry) - 1 - row;
  const int position = closing.position - back;
  const bool overlap = geometry.overlaps() && row < geometry.ratio;
  if (position < 0) return {WindowRow::kNothing, 0, 0, 0};
  if (position < closing.start) {
    return {WindowRow::kTail, 0, 0, overlap ? geometry.overlap_row(position) : geometry.current_row(position)};
  }
  const int first_column = overlap ? 0 : columns - tail.width;
  return {WindowRow::kStep, static_cast<int64_t>(index - back) * columns + first_column,
          static_cast<int64_t>(position % geometry.ratio) * columns + first_column, 0};
}

}  // namespace dsv4
