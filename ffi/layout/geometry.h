// The rows of a compressor's tail: where the halves of a token lie, and how long they are kept.
#pragma once

#include "layout/kinds.h"

namespace dsv4 {

constexpr float kClearedScore = -1e9f;  // of a row that holds nothing

// A compressor keeps what it has not pooled yet. Where entries overlap, a token's *overlap* half is pooled by the next
// window's entry, its *current* half by its own window's; without overlap there are current halves only. Both lie in
// rings by position, the current halves' ring behind the other: closing a window moves nothing.
//
// A request can go back by as many tokens as its tail is deep: rings are `depth` rows longer than the open window (and
// the one before it) needs, so that what the earlier length needs is still there. With overlap, depth is a multiple of
// the ratio.
struct TailGeometry {
  int ratio;
  int depth = 0;

  DSV4_HOST_DEVICE bool overlaps() const { return entries_overlap(ratio); }
  DSV4_HOST_DEVICE int overlap_ring() const { return overlaps() ? 2 * ratio + depth : 0; }
  DSV4_HOST_DEVICE int current_ring() const { return ratio + depth; }
  DSV4_HOST_DEVICE int rows() const { return overlap_ring() + current_ring(); }
  DSV4_HOST_DEVICE int overlap_row(int position) const { return position % overlap_ring(); }
  DSV4_HOST_DEVICE int current_row(int position) const { return overlap_ring() + position % current_ring(); }

  // The window that is open at the earliest position that a request may go back to, once its next position is `next`.
  DSV4_HOST_DEVICE int earliest_window(int next) const { return (next > depth ? next - depth : 0) / ratio; }

  // Whether the halves of a token are still needed once the request's next position is `next`.
  DSV4_HOST_DEVICE bool overlap_survives(int position, int next) const {
    return overlaps() && position / ratio >= earliest_window(next) - 1;
  }
  DSV4_HOST_DEVICE bool current_survives(int position, int next) const {
    return position / ratio >= earliest_window(next);
  }

  // Whether a tail row holds something that is still needed once the request's next position is `next`.
  DSV4_HOST_DEVICE bool row_in_use(int row, int next) const {
    const bool current = row >= overlap_ring();
    const int ring = current ? current_ring() : overlap_ring();
    const int last = next - 1;  // the ring's rows hold the positions last - ring + 1 .. last
    const int position = last - (last - (current ? row - overlap_ring() : row) + ring) % ring;
    if (next <= 0 || position < 0) return false;
    return current ? current_survives(position, next) : overlap_survives(position, next);
  }
};

// The depth of a tail with this many rows; below 0 where no depth gives that many.
DSV4_HOST_DEVICE int tail_depth(int ratio, int64_t rows) {
  const int64_t deeper = rows - TailGeometry{ratio}.rows();
  if (!entries_overlap(ratio)) return static_cast<int>(deeper);
  return deeper % (2 * ratio) == 0 ? static_cast<int>(deeper / 2) : -1;
}

}  // namespace dsv4
