// Per-request state on the host: begin_step, append_window, append_tail, rotate.

#include <algorithm>
#include <vector>

#include "cpu/running.h"
#include "ops/signatures.h"

namespace dsv4::cpu {
namespace {

void clear_row(const Tail& tail, int64_t layer, int slot, int row) {
  std::fill_n(tail_row(tail, layer, slot, 0, row), tail.width, 0.0f);
  std::fill_n(tail_row(tail, layer, slot, 1, row), tail.width, kClearedScore);
}

// As `init_cache` leaves it.
void clear_running(const Tail& tail, int64_t layer, int slot, int row) {
  float* state = running_state(tail, layer, slot, row);
  std::fill_n(state, tail.width, kClearedScore);
  std::fill_n(state + tail.width, 2 * tail.width, 0.0f);
}

// The states after the last tokens of each request, as far as those leave a window open.
void append_running(const AppendTailParams& params, int64_t layer) {
  const Tail& tail = params.tail;
  std::vector<float> state(3 * static_cast<size_t>(tail.width)), before(state.size());
  for (int index = 0; index < params.plan.requests; ++index) {
    const Request request = request_at(params.plan, index, tail.slots);
    if (!request.valid) continue;
    const int first = params.plan.query_start()[index] - request.start;  // plus a position: the token's flat index
    const int kept = first_state(tail, request.start, request.next);
    std::copy_n(state_before(tail, layer, request.slot, request.start), before.size(), before.data());
    for (int window = kept / kHcaRatio * kHcaRatio; window < request.next; window += kHcaRatio) {
      const WindowStates states = window_states(window, kept, request.next);
      for (int position = states.first; position <= states.last; ++position) {
        WindowTokens tokens{true, first + position, position, 1};
        if (position == states.first) {
          tokens = window_tokens(request.start, position, first + position);
          state = before;
          if (!tokens.resumes) clear_state(state.data(), tail.width);
        }
        fold_tokens(params.projections, tokens, tail.width, state.data());
        std::copy(state.begin(), state.end(), running_state(tail, layer, request.slot, position));
      }
    }
  }
}

}  // namespace

void begin_step(const BeginStepParams& params) {
  const Plan& plan = params.plan;
  for (int index = 0; index < plan.requests; ++index) {
    const int64_t slot = plan.request_slot()[index];
    if (slot < 0 || slot >= params.slots || plan.request_reset()[index] == 0) continue;
    for (int32_t* table : {params.block_table, params.write_table}) {
      std::fill_n(table + slot * params.max_blocks, params.max_blocks, -1);
    }
    for (int64_t layer = 0; layer < params.window_layers; ++layer) {
      std::fill_n(params.window_positions + (layer * params.slots + slot) * params.ring, params.ring, -1);
    }
  }
  for (int change = 0; change < plan.table_changes(); ++change) {
    const int64_t slot = plan.table_slot()[change];
    const int index = plan.table_index()[change];
    if (slot < 0 || slot >= params.slots || index < 0 || index >= params.max_blocks) continue;
    for (int32_t* table : {params.block_table, params.write_table}) {
      table[slot * params.max_blocks + index] = plan.table_block()[change];
    }
  }
  std::copy_n(plan.packed, plan.size(), params.plan_copy);
}

void append_window(const AppendWindowParams& params) {
  const Pool& window = params.window;
  const int64_t layer = *params.layer;
  if (layer < 0 || layer >= window.layers) return;
  visit_codec(window.width, window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    float row[Codec::kWidth];
    for (int index = 0; index < params.plan.tokens; ++index) {
      const Token token = token_at(params.plan, index, static_cast<int>(window.pages));
      if (!token.valid || token.position < token.next - window.rows) continue;
      const int64_t page = layer * window.pages + token.slot;
      const int ring_row = token.position % window.rows;
      load_floats(params.rows, params.element, static_cast<int64_t>(index) * Codec::kWidth, Codec::kWidth, row);
      store_row<Codec>(stored_row<Codec>(window.data + page * window.page_bytes, window.rows, ring_row), row,
                       window.global_scale);
      params.positions[page * window.rows + ring_row] = token.position;
    }
  });
}

void append_tail(const AppendTailParams& params) {
  const Tail& tail = params.tail;
  const TailGeometry& geometry = tail.geometry;
  const Projections& in = params.projections;
  const int64_t layer = *params.layer;
  if (layer < 0 || layer >= tail.layers) return;
  if (tail.running) {
    append_running(params, layer);
    return;
  }
  for (int index = 0; index < params.plan.tokens; ++index) {
    const Token token = token_at(params.plan, index, tail.slots);
    if (!token.valid) continue;
    const auto write = [&](int row, int first_column) {
      const int64_t projection = static_cast<int64_t>(index) * in.columns + first_column;
      const float* position_bias =
          in.position_bias + static_cast<int64_t>(token.position % geometry.ratio) * in.columns + first_column;
      float* kv = tail_row(tail, layer, token.slot, 0, row);
      float* score = tail_row(tail, layer, token.slot, 1, row);
      for (int channel = 0; channel < tail.width; ++channel) {
        kv[channel] = element(in.kv, in.element, projection + channel);
        score[channel] = element(in.gate, in.element, projection + channel) + position_bias[channel];
      }
    };
    if (geometry.overlap_survives(token.position, token.next)) write(geometry.overlap_row(token.position), 0);
    if (geometry.current_survives(token.position, token.next)) {
      write(geometry.current_row(token.position), in.columns - tail.width);
    }
  }
}

void rotate(const RotateParams& params) {
  const Tail& tail = params.tail;
  const TailGeometry& geometry = tail.geometry;
  const int64_t layer = *params.layer;
  if (layer < 0 || layer >= tail.layers) return;
  for (int index = 0; index < params.plan.requests; ++index) {
    const Request request = request_at(params.plan, index, tail.slots);
    if (!request.valid) continue;
    if (tail.running) {
      for (int row = 0; row <= geometry.depth; ++row) {
        if (!state_in_use(tail, row, request.next)) clear_running(tail, layer, request.slot, row);
      }
      continue;
    }
    if (geometry.earliest_window(request.start) == geometry.earliest_window(request.next)) continue;
    for (int row = 0; row < geometry.rows(); ++row) {
      if (!geometry.row_in_use(row, request.next)) clear_row(tail, layer, request.slot, row);
    }
  }
}

}  // namespace dsv4::cpu
