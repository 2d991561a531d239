// What the kernels of prefill share: looking up closing windows, and storing the rows that survive a step.
//
// Nothing orders the two, so a request's tail is moved on by one of them: by the blocks that close its first windows,
// if these pool rows of the tail, else by whoever stores the surviving rows.
#pragma once

#include "cuda/state/tail.cuh"
#include "cuda/state/window.cuh"
#include "cuda/update/update.cuh"

namespace dsv4::cuda {

// What a warp makes a window row of, besides the weights that all rows share.
struct LoadedWindowRow {
  WarpRow<kHeadDim> row;
  float cos[2];  // angles only where the row comes raw
  float sin[2];
};

// Channels that RoPE applies to are the upper half of a warp's last quad.
static_assert(kRopeDim == kQuadChannels / 2);

template <class RowT>
__device__ __forceinline__ LoadedWindowRow load_window_row(const UpdateParams& params, int index, int lane) {
  LoadedWindowRow loaded;
  const RowT* rows = static_cast<const RowT*>(params.window.rows) + static_cast<int64_t>(index) * kHeadDim;
#pragma unroll
  for (int q = 0; q < loaded.row.kQuads; ++q) load_values(rows + channel_of(q, lane), loaded.row.x[q]);
  if (params.norm.weight != nullptr && lane >= kWarp / 2) {
    const int64_t pair = static_cast<int64_t>(index) * (kRopeDim / 2) + 2 * (lane - kWarp / 2);
    load_values(params.norm.cos + pair, loaded.cos);
    load_values(params.norm.sin + pair, loaded.sin);
  }
  return loaded;
}

// The weights that raw window rows are normalized with.
__device__ __forceinline__ WarpRow<kHeadDim> load_norm_weight(const UpdateParams& params, int lane) {
  WarpRow<kHeadDim> weight{};
  if (params.norm.weight == nullptr) return weight;
#pragma unroll
  for (int q = 0; q < weight.kQuads; ++q) load_values(params.norm.weight + channel_of(q, lane), weight.x[q]);
  return weight;
}

// One warp stores the window row of a token, normalizing and rotating it first where it comes raw.
__device__ __forceinline__ void store_window_row(const UpdateParams& params, int64_t layer, const Token& token,
                                                 const LoadedWindowRow& loaded, const WarpRow<kHeadDim>& weight,
                                                 int lane) {
  const Pool& window = params.window.window;
  WarpRow<kHeadDim> row = loaded.row;
  if (params.norm.weight != nullptr) {
    float sums[row.kQuads];
#pragma unroll
    for (int q = 0; q < row.kQuads; ++q) sums[q] = sum_over_lanes(square_sum(row.x[q]));
    const float inverse = inverse_rms((sums[0] + sums[1]) + (sums[2] + sums[3]), kHeadDim, params.norm.eps);
#pragma unroll
    for (int q = 0; q < row.kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row.x[q][i] = row.x[q][i] * inverse * weight.x[q][i];
    }
    if (lane >= kWarp / 2) rotate_pairs(row.x[row.kQuads - 1], loaded.cos, loaded.sin, 0);
  }
  visit_window_codec(window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    store_in_ring<Codec>(window, params.window.positions, layer, token, row, lane);
  });
}

// Whether one of the windows that a request closes in a step pools rows of the tail.
template <int kRatio>
__device__ __forceinline__ bool closes_from_tail(int start, int next) {
  return start / kRatio != next / kRatio && (kRatio == kCsaRatio ? start > 0 : start % kRatio != 0);
}

// Whether this step brought all rows that the window closed by `closing` pools.
template <int kRatio>
__device__ __forceinline__ bool all_in_step(const Token& closing) {
  return closing.position - (pooled_rows(TailGeometry{kRatio}) - 1) >= closing.start;
}

// The tokens whose rows may survive: the last `per_request` of each request, or if that makes fewer, all of the step.
struct LastTokens {
  int requests;
  int per_request;
  int tokens;

  __host__ __device__ bool all() const { return tokens < int64_t{requests} * per_request; }
  __host__ __device__ int count() const { return all() ? tokens : requests * per_request; }
};

template <int kRatio>
LastTokens last_tokens(const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const TailGeometry& geometry = params.entries.compressor.tail.geometry;
  const int kept = kRatio == 0 ? 0 : std::max(geometry.overlap_ring(), geometry.current_ring());
  return {plan.requests, std::max(params.window.window.rows, kept), plan.tokens};
}

// One warp stores what survives of token `index`.
template <class T, int kRatio, bool kDeep>
__device__ __forceinline__ void append_last_token(const UpdateParams& params, const Token& token, int index,
                                                  const LoadedWindowRow& row, const WarpRow<kHeadDim>& weight,
                                                  int lane) {
  const Pool& window = params.window.window;
  const int64_t window_layer = *params.window.layer;
  if (token.position >= token.next - window.rows && has_layer(window, window_layer)) {
    store_window_row(params, window_layer, token, row, weight, lane);
  }
  if constexpr (kRatio != 0) {
    const int64_t layer = *params.kind_layer;
    if (!has_layer(params.entries.pool, layer) || closes_from_tail<kRatio>(token.start, token.next)) return;
    const Compressor compressor = with_constants<kHeadDim, kRatio, kDeep>(params.entries.compressor);
    const Tail& tail = compressor.tail;
    if (!tail.geometry.overlap_survives(token.position, token.next) &&
        !tail.geometry.current_survives(token.position, token.next)) {
      return;
    }
    constexpr int kAtOnce = 2;  // quads whose loads are in flight together: all four would not fit in registers
#pragma unroll
    for (int first = 0; first < WarpRow<kHeadDim>::kQuads; first += kAtOnce) {
      TokenHalves<4> halves[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        halves[q] = load_halves<T, 4>(tail, compressor.projections, index, channel_of(first + q, lane));
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        store_halves(tail, compressor.projections, layer, token, halves[q], channel_of(first + q, lane));
      }
    }
    if constexpr (kRatio == kCsaRatio) {
      const Compressor keys = with_constants<kKeyDim, kRatio, kDeep>(params.keys.compressor);
      append_token<T, 4>(keys.tail, keys.projections, layer, token, index, channel_of(0, lane));
    }
  }
}

// Token `item` of the last ones: its place in the step, its request's, and how many tokens of that come behind. An
// index of -1 where there is none.
struct LastToken {
  int index = -1;
  int place = 0;
  int back = 0;

  __device__ __forceinline__ LastToken(const Plan& plan, const LastTokens& last, int item) {
    if (item >= last.count()) return;
    place = item / last.per_request, back = item % last.per_request;
    if (last.all()) place = plan.token_request()[item];
    if (place < 0 || place >= last.requests) return;
    const int first = plan.query_start()[place], end = plan.query_start()[place + 1];
    if (last.all()) back = end - 1 - item;
    if (back < 0 || back >= last.per_request || first < 0 || end - 1 - back < first || end > plan.tokens) return;
    index = end - 1 - back;
  }
};

// The part of warp `warp` of `warps` in storing all that survives. Each lane looks one of its tokens up, while the
// first one's row is on its way.
template <class RowT, class T, int kRatio, bool kDeep>
__device__ __forceinline__ void append_last_tokens(const UpdateParams& params, const LastTokens& last, int warp,
                                                   int warps, int lane) {
  const Plan& plan = params.window.plan;
#pragma unroll 1
  for (int begin = warp; begin < last.count(); begin += kWarp * warps) {
    const LastToken mine(plan, last, begin + lane * warps);
    const int first = __shfl_sync(kAllLanes, mine.index, 0);
    LoadedWindowRow row;
    if (first >= 0) row = load_window_row<RowT>(params, first, lane);
    Request request{};
    if (mine.index >= 0) request = request_at(plan, mine.place, static_cast<int>(params.window.window.pages));
    const int found = request.valid ? mine.index : -1, position = request.next - 1 - mine.back;
    const int count = min(kWarp, (last.count() - begin + warps - 1) / warps);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const auto of_lane = [&](int value) { return __shfl_sync(kAllLanes, value, i); };
      const int index = of_lane(found);
      if (i > 0 && index >= 0) row = load_window_row<RowT>(params, index, lane);
      const Token one{index >= 0, of_lane(request.slot), of_lane(position), of_lane(request.start),
                      of_lane(request.next)};
      const WarpRow<kHeadDim> weight = load_norm_weight(params, lane);
      if (one.valid) append_last_token<T, kRatio, kDeep>(params, one, index, row, weight, lane);
    }
  }
}

// A closing window, looked up.
struct ClosingWindow {
  enum Kind { kNone, kStep, kTail } kind;  // kStep: this step brought all its rows
  int index;
  int row;              // of the entry in its page
  uint8_t* entry_page;  // null where there is none
  uint8_t* key_page;
  Token closing;
};

// As token_at and block_of_entry, but with as few loads as possible one behind the other.
template <int kRatio>
__device__ __forceinline__ ClosingWindow look_up(const UpdateParams& params, int row) {
  const Plan& plan = params.window.plan;
  const Pool entries = with_rows<kBlockTokens / kRatio>(params.entries.pool);
  const BlockTable& table = params.table;
  ClosingWindow window{ClosingWindow::kNone, load_early(plan.closing(kRatio) + row), 0, nullptr, nullptr, {}};
  const int64_t layer = load_early(params.kind_layer);
  const int index = window.index;
  if (index < 0 || index >= plan.tokens || !has_layer(entries, layer)) return window;
  const int slot = load_early(plan.token_slot() + index), position = load_early(plan.token_position() + index);
  const int request = load_early(plan.token_request() + index);
  if (!is_in_range(plan, table.slots, slot, position, request)) return window;
  const int first = load_early(plan.query_start() + request), end = load_early(plan.query_start() + request + 1);
  const int entry = position / kRatio, place = entry / entries.rows;
  int block = -1;
  if (place < table.max_blocks) block = load_early(table.data + static_cast<int64_t>(slot) * table.max_blocks + place);
  window.closing = token_of(plan, index, slot, position, first, end);
  if (!window.closing.valid) return window;
  window.kind = all_in_step<kRatio>(window.closing) ? ClosingWindow::kStep : ClosingWindow::kTail;
  window.row = entry % entries.rows;
  window.entry_page = place_in_block(entries, layer, block, entry).page;
  if (kRatio == kCsaRatio) {
    window.key_page = place_in_block(with_rows<kBlockTokens / kRatio>(params.keys.pool), layer, block, entry).page;
  }
  return window;
}

}  // namespace dsv4::cuda
