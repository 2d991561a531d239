// What one request writes in a decode step to which it brings one token: a window row, and for each compressor the
// token's halves and perhaps an entry.
//
// So little work is all latency. Code is read from memory too, and runs once, so a row is spread over many warps that
// each run through little of it; and what needs nothing of the plan, then what needs only the plan, is loaded together.
// Where requests bring several tokens (requests.cuh) each function calls `several` instead.
//
// kDeep: the rings of the tail are deeper than pooling needs (a lookahead), so that a ring row costs a division.
// Without a lookahead they are powers of two, known while compiling.
#pragma once

#include "cuda/close/running.cuh"
#include "cuda/core/device_codecs.cuh"
#include "layout/places.h"

namespace dsv4::cuda {

// The fields of a plan that tell what single tokens bring. The host finds them: it takes dozens of instructions.
struct TokenFields {
  const int32_t* slot;
  const int32_t* position;
  const int32_t* longest;

  explicit TokenFields(const Plan& plan)
      : slot(plan.request_slot()), position(plan.token_position()), longest(plan.longest()) {}
};

// A request's token, if no request brings more than one, and the layer to write. Loaded in one go, judged when needed.
struct OnlyToken {
  int longest;
  unsigned layer;
  unsigned slot;
  unsigned position;

  __device__ __forceinline__ OnlyToken(const TokenFields& fields, int place, const int32_t* layer_of)
      : longest(load_early(fields.longest)),
        layer(load_early(layer_of)),
        slot(load_early(fields.slot + place)),
        position(load_early(fields.position + place)) {}

  // Whether a request of the step brings more.
  __device__ __forceinline__ bool has_others() const { return longest > 1; }

  // Whether it may be written to that pool and as many slots. The compiler may not see through the answer: it would lay
  // the way of several tokens between the two halves of the usual one, and code that runs once is fetched line by line.
  __device__ __forceinline__ bool fits(const Pool& pool, int64_t slots) const {
    const unsigned checked = slot | (position & 0x80000000u);  // beyond all slots where the position is negative
    int fits = longest == 1 && layer < static_cast<unsigned>(pool.layers) && checked < static_cast<unsigned>(slots);
    asm volatile("" : "+r"(fits));
    return fits != 0;
  }
};

// Addresses of what is in range. No factor needs more than 32 bits, which saves multiplications.
__device__ __forceinline__ uint8_t* page_at(const Pool& pool, unsigned layer, unsigned page) {
  const uint64_t place = static_cast<uint64_t>(layer) * static_cast<unsigned>(pool.pages) + page;
  return pool.data + place * static_cast<unsigned>(pool.page_bytes);
}

// A request's tail, that many floats long.
__device__ __forceinline__ float* tail_at(const Tail& tail, const OnlyToken& token, unsigned floats) {
  const uint64_t request = token.layer * static_cast<unsigned>(tail.slots) + token.slot;
  return tail.data + request * floats;
}

// Stores the window row of a token that is in range, by all its threads.
template <int N>
__device__ __forceinline__ void store_window_token(const UpdateParams& params, unsigned layer, unsigned slot,
                                                   unsigned position, const float (&x)[N],
                                                   const RowThreads<kHeadDim, N>& threads) {
  const Pool& window = params.window.window;
  const unsigned rows = window.rows, mask = rows - 1;
  const unsigned row = (rows & mask) == 0 ? position & mask : position % rows;  // a division takes long
  if (threads.thread == 0) {
    const uint64_t page = layer * static_cast<unsigned>(window.pages) + slot;
    params.window.positions[page * rows + row] = position;
  }
  visit_window_codec(window.codec, [&](auto codec) {
    using Codec = decltype(codec);
    store_spread<Codec>(stored_row<Codec>(page_at(window, layer, slot), rows, row), x, window.global_scale, threads);
  });
}

// The window row of request `place`, normalized and rotated first where it comes raw.
template <class RowT, int N, class Several>
__device__ __forceinline__ void append_window_token(const UpdateParams& params, const TokenFields& fields, int place,
                                                    const RowThreads<kHeadDim, N>& threads, Several&& several) {
  const unsigned channel = threads.channel(), angles = place * (kRopeDim / 2);
  const Pool& window = params.window.window;
  const Norm& norm = params.norm;
  const OnlyToken token(fields, place, params.window.layer);
  FinishOf<N> finish;
  if (norm.weight != nullptr) {
    finish = FinishOf<N>::template load<kHeadDim>(norm.weight, norm.cos + angles, norm.sin + angles, channel);
  }
  float x[N];
  load_early(static_cast<const RowT*>(params.window.rows) + (place * kHeadDim + channel), x);
  if (norm.weight != nullptr) finish.template apply<kHeadDim>(x, threads.sum(square_sum(x)), norm.eps, channel);
  if (!token.fits(window, window.pages)) {
    if (token.has_others()) several();
    return;
  }
  store_window_token(params, token.layer, token.slot, token.position, x, threads);
}

// The rows that a closing CSA window pools, two channels a thread.
struct CsaRows {
  float kv[kGroupRows][2];
  float score[kGroupRows][2];
};

// One CSA compressor's work on request `place`. A thread reads and writes only its own channels of the tail.
template <bool kDeep, class T, int W, class Several>
__device__ __forceinline__ void compress_csa_token(const UpdateParams& params, const Compression& part,
                                                   const TokenFields& fields, int place,
                                                   const RowThreads<W, 2>& threads, Several&& several) {
  constexpr unsigned kColumns = 2 * W;
  const Compressor compressor = with_constants<W, kCsaRatio, kDeep>(part.compressor);
  const TailGeometry& geometry = compressor.tail.geometry;
  const unsigned overlap_ring = geometry.overlap_ring(), current_ring = geometry.current_ring();
  const unsigned scores = (overlap_ring + current_ring) * W;  // from a tail row to its scores
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const Projections& in = compressor.projections;
  const unsigned channel = threads.channel(), own = place * kColumns + channel, angles = place * (kRopeDim / 2);
  const OnlyToken token(fields, place, params.kind_layer);
  float kv[2][2], score[2][2];  // overlap half, current half
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_early(static_cast<const T*>(in.kv) + own + half * W, kv[half]);
    load_early(static_cast<const T*>(in.gate) + own + half * W, score[half]);
  }
  const auto finish =
      FinishOf<2>::load<W>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
  if (!token.fits(pool, params.table.slots)) {
    if (token.has_others()) several();
    return;
  }

  const unsigned phase = token.position % kCsaRatio, entry = token.position / kCsaRatio;
  const bool closes = phase == kCsaRatio - 1;
  const unsigned overlap_row = token.position % overlap_ring, current_row = token.position % current_ring;
  float* const rows = tail_at(compressor.tail, token, 2 * scores) + channel;
  float* const current_rows = rows + overlap_ring * W;
  CsaRows window;
  int block = -1;
  if (closes) {
    // The window before begins seven rows back around the ring, this one's other rows are the three before its last.
    constexpr unsigned kBack = 2 * kCsaRatio - 1;
    const unsigned previous_row = overlap_row < kBack ? overlap_row + overlap_ring - kBack : overlap_row - kBack;
    const float* const previous = rows + previous_row * W;
    const float* const current = current_rows + (current_row - (kCsaRatio - 1)) * W;
#pragma unroll
    for (int i = 0; i < kGroupRows - 1; ++i) {
      const float* const from = i < kCsaRatio ? previous + i * W : current + (i - kCsaRatio) * W;
      load_early(from, window.kv[i]);
      load_early(from + scores, window.score[i]);
    }
    const unsigned index = entry / pool.rows, blocks = params.table.max_blocks;
    if (index < blocks) block = load_early(params.table.data + (static_cast<uint64_t>(token.slot) * blocks + index));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float position_bias[2];
    load_early(in.position_bias + (phase * kColumns + channel) + half * W, position_bias);
#pragma unroll
    for (int i = 0; i < 2; ++i) score[half][i] += position_bias[i];
  }
  const auto store = [&](int half, float* to) {
    store_values(to, kv[half]);
    store_values(to + scores, score[half]);
  };
  store(0, rows + overlap_row * W);
  if (kDeep || !closes) store(1, current_rows + current_row * W);  // a closed window may be opened again if deep
  if (!closes) return;

  if (static_cast<unsigned>(block) >= static_cast<unsigned>(pool.pages)) return;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    window.kv[kGroupRows - 1][c] = kv[1][c], window.score[kGroupRows - 1][c] = score[1][c];
#pragma unroll
    for (int i = 0; i < kCsaRatio; ++i) {
      if (entry == 0) window.kv[i][c] = 0.0f, window.score[i][c] = kNoScore;
    }
  }
  // All that follows once for each codec: a warp jumps while it waits for the rows, not between the steps.
  visit_on_device(CodecsOf<W>{}, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    float x[2];
    pooled(pool_group(window.kv, window.score), x);
    finish.template apply<W>(x, threads.sum(square_sum(x)), compressor.eps, channel);
    if constexpr (W == kKeyDim) {
      if (compressor.hadamard) hadamard_transform(x, threads);
    }
    store_spread<Codec>(stored_row<Codec>(page_at(pool, token.layer, block), pool.rows, entry % pool.rows), x,
                        pool.global_scale, threads);
  });
}

// Keeps what an HCA token brings, four channels a thread.
template <bool kDeep, class T>
__device__ __forceinline__ void append_hca_token(const UpdateParams& params, const OnlyToken& token, int place,
                                                 unsigned channel) {
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio, kDeep>(params.entries.compressor);
  const Projections& in = compressor.projections;
  const unsigned ring = compressor.tail.geometry.current_ring(), scores = ring * kHeadDim;
  const unsigned own = place * kHeadDim + channel;
  float kv[4], score[4], position_bias[4];
  load_early(static_cast<const T*>(in.kv) + own, kv);
  load_early(static_cast<const T*>(in.gate) + own, score);
  load_early(in.position_bias + (token.position % kHcaRatio * kHeadDim + channel), position_bias);
#pragma unroll
  for (int i = 0; i < 4; ++i) score[i] += position_bias[i];
  float* const row = tail_at(compressor.tail, token, 2 * scores) + (token.position % ring * kHeadDim + channel);
  store_values(row, kv);
  store_values(row + scores, score);
}

// A running HCA tail's work on request `place`: its token goes into the open window, which it may close.
template <class T, class Several>
__device__ __forceinline__ void fold_token(const UpdateParams& params, const TokenFields& fields, int place,
                                           const RowThreads<kHeadDim>& threads, Several&& several) {
  const Compressor compressor = with_constants<kHeadDim, kHcaRatio>(params.entries.compressor);
  const Pool pool = with_rows<kBlockTokens / kHcaRatio>(params.entries.pool);
  const Projections& in = compressor.projections;
  const unsigned channel = threads.channel(), own = place * kHeadDim + channel, angles = place * (kRopeDim / 2);
  const OnlyToken token(fields, place, params.kind_layer);
  float kv[4], score[4], position_bias[4];
  load_early(static_cast<const T*>(in.kv) + own, kv);
  load_early(static_cast<const T*>(in.gate) + own, score);
  if (!token.fits(pool, params.table.slots)) {
    if (token.has_others()) several();
    return;
  }
  const unsigned phase = token.position % kHcaRatio, entry = token.position / kHcaRatio;
  constexpr unsigned kState = 3 * kHeadDim;
  const unsigned states = compressor.tail.geometry.depth + 1, row = states == 1 ? 0 : token.position % states;
  float* const ring = tail_at(compressor.tail, token, states * kState) + channel;
  const float* const before = ring + (row == 0 ? states - 1 : row - 1) * kState;
  Partials<4> open = phase == 0 ? empty_partials<4>() : load_state<4>(before);
  load_early(in.position_bias + phase * kHeadDim + channel, position_bias);
#pragma unroll
  for (int i = 0; i < 4; ++i) score[i] += position_bias[i];
  open = fold(open, kv, score);
  if (phase != kHcaRatio - 1) {
    store_state(ring + row * kState, open);
    return;
  }

  const Finish finish =
      Finish::load<kHeadDim>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
  const int block = block_of_entry(pool, params.table, token.slot, entry);
  const EntryPlace at = place_in_block(pool, token.layer, block, entry);
  if (at.page == nullptr) return;
  visit_on_device(HeadCodecs{}, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    float x[4];
    pooled(open, x);
    finish.template apply<kHeadDim>(x, threads.sum(square_sum(x)), compressor.eps, channel);
    store_spread<Codec>(stored_row<Codec>(at.page, pool.rows, at.row), x, pool.global_scale, threads);
  });
}

}  // namespace dsv4::cuda
