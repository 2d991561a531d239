// Where each row of a closing window comes from: this step's projections, the tail, or nothing (before the first
// token).
#pragma once

#include "ops/params.h"

namespace dsv4 {

DSV4_HOST_DEVICE float* tail_row(const Tail& tail, int64_t layer, int slot, int stream, int row) {
  const int64_t request = (layer * tail.slots + slot) * 2 + stream;
  return tail.data + (request * tail.geometry.rows() + row) * tail.width;
}

// A running tail's state of a request's open window after the token at `position`: [3 (max, denominator, sum), width].
// The latest depth + 1 lie in a ring by position. It means nothing where that token closed a window.
DSV4_HOST_DEVICE float* running_state(const Tail& tail, int64_t layer, int slot, int position) {
  const int states = tail.geometry.depth + 1;
  const int64_t first = (layer * tail.slots + slot) * states;
  return tail.data + (first + (states == 1 ? 0 : position % states)) * 3 * tail.width;
}

// The one that a step which begins at `start` goes on from, if a window is open there.
DSV4_HOST_DEVICE float* state_before(const Tail& tail, int64_t layer, int slot, int start) {
  return running_state(tail, layer, slot, start > 0 ? start - 1 : 0);
}

// Which states a step leaves in a window that begins at `window`: those after the tokens at first .. last. None after
// the token that closes the window.
struct WindowStates {
  int first;
  int last;
};

// The first position whose state is kept once the request's next position is `next`, of those that its step brings.
DSV4_HOST_DEVICE int first_state(const Tail& tail, int start, int next) {
  const int first = next - 1 - tail.geometry.depth;
  return first > start ? first : start;
}

DSV4_HOST_DEVICE WindowStates window_states(int window, int first_kept, int next) {
  const int end = window + kHcaRatio - 1;
  return {first_kept > window ? first_kept : window, (end < next ? end : next) - 1};
}

// Whether ring row `row` of the states holds one that still counts once the request's next position is `next`.
DSV4_HOST_DEVICE bool state_in_use(const Tail& tail, int row, int next) {
  const int states = tail.geometry.depth + 1, last = next - 1;
  const int position = last - (last - row + states) % states;
  return position >= 0 && position % kHcaRatio != kHcaRatio - 1;
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
