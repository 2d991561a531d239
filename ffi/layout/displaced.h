// Where the rows come from that a step sets aside for attention, in the order of AttendParams::displaced: of each
// request the window before its first token, from the ring, then its own rows.
#pragma once

#include "layout/places.h"
#include "ops/params.h"

namespace dsv4 {

// Row `row` of a page of `rows` rows; `page` is null where there is nothing to set aside.
struct DisplacedSource {
  const uint8_t* page;
  int rows;
  int row;
  int position;
};

DSV4_HOST_DEVICE DisplacedSource displaced_source(const SaveDisplacedParams& params, int number) {
  const DisplacedSource nothing{nullptr, 0, 0, -1};
  const int before = params.window_size - 1;  // rows of each request that its first token sees
  const auto first_of = [&](int request) { return before * request + params.plan.query_start()[request]; };
  int request = 0;  // the last one whose rows begin at or before this one
  for (int end = params.plan.requests; end - request > 1;) {
    const int middle = (request + end) / 2;
    (first_of(middle) <= number ? request : end) = middle;
  }
  const Request found = request_at(params.plan, request, static_cast<int>(params.window.pages));
  const int place = number - first_of(request), position = found.start - before + place;
  if (!found.valid || position < 0 || position >= found.next) return nothing;
  if (place >= before) {
    const int token = params.plan.query_start()[request] + place - before;
    return {params.stored.data, params.stored.rows, token, position};
  }
  const WindowPlace held = place_in_window(params.window, params.positions, *params.layer, found.slot, position);
  return {held.page, params.window.rows, held.row, held.position};
}

}  // namespace dsv4
