// Finished rows on the host: compress pools, normalizes and rotates closed windows, normalize does so with window rows.

#include <algorithm>
#include <vector>

#include "cpu/running.h"
#include "ops/signatures.h"

namespace dsv4::cpu {
namespace {

constexpr int kMaxGroups = kHcaRatio / kGroupRows;

// Reads one row of the window into kv and score.
void read_row(const Compressor& compressor, int64_t layer, const Token& closing, int index, int row, float* kv,
              float* score) {
  const Tail& tail = compressor.tail;
  const Projections& in = compressor.projections;
  const WindowRow from = window_row(tail, in.columns, closing, index, row);
  for (int channel = 0; channel < tail.width; ++channel) {
    if (from.source == WindowRow::kStep) {
      kv[channel] = element(in.kv, in.element, from.projection + channel);
      score[channel] =
          element(in.gate, in.element, from.projection + channel) + in.position_bias[from.position_bias + channel];
    } else if (from.source == WindowRow::kTail) {
      kv[channel] = tail_row(tail, layer, closing.slot, 0, from.tail_row)[channel];
      score[channel] = tail_row(tail, layer, closing.slot, 1, from.tail_row)[channel];
    } else {
      kv[channel] = 0.0f;
      score[channel] = kNoScore;
    }
  }
}

float pool_channel(const float* kv, const float* score, int rows, int width, int channel) {
  SoftmaxPartial partials[kMaxGroups];
  int groups = rows / kGroupRows;
  for (int group = 0; group < groups; ++group) {
    float group_kv[kGroupRows], group_score[kGroupRows];
    for (int row = 0; row < kGroupRows; ++row) {
      const int64_t from = static_cast<int64_t>(group * kGroupRows + row) * width + channel;
      group_kv[row] = kv[from];
      group_score[row] = score[from];
    }
    partials[group] = pool_group(group_kv, group_score);
  }
  for (; groups > 1; groups /= 2) {
    for (int i = 0; i < groups / 2; ++i) partials[i] = merge(partials[2 * i], partials[2 * i + 1]);
  }
  return pooled(partials[0]);
}

// Pools the window that token `index` closes, from its rows. `scratch` is memory for all windows of a call.
void pool_rows(const Compressor& compressor, int64_t layer, const Token& closing, int index,
               std::vector<float>& scratch, float* entry) {
  const int width = compressor.tail.width, rows = pooled_rows(compressor.tail.geometry);
  const size_t floats = static_cast<size_t>(rows) * width;
  scratch.resize(2 * floats);
  float *kv = scratch.data(), *score = kv + floats;
  for (int i = 0; i < rows; ++i) {
    const size_t first = static_cast<size_t>(i) * width;
    read_row(compressor, layer, closing, index, i, kv + first, score + first);
  }
  for (int channel = 0; channel < width; ++channel) entry[channel] = pool_channel(kv, score, rows, width, channel);
}

// The same from a running tail, which it leaves as it is.
void pool_running(const Compressor& compressor, int64_t layer, const Token& closing, int index,
                  std::vector<float>& scratch, float* entry) {
  const int width = compressor.tail.width;
  const WindowTokens tokens = window_tokens(closing.start, closing.position, index);
  scratch.resize(3 * static_cast<size_t>(width));
  float* state = scratch.data();
  if (tokens.resumes) {
    std::copy_n(state_before(compressor.tail, layer, closing.slot, closing.start), scratch.size(), state);
  } else {
    clear_state(state, width);
  }
  fold_tokens(compressor.projections, tokens, width, state);
  for (int channel = 0; channel < width; ++channel) entry[channel] = pooled(partial_of(state, width, channel));
}

void normalize_row(float* x, int width, const float* weight, float eps) {
  float sums[kHeadDim / 4];
  for (int leaf = 0; leaf < width / 4; ++leaf) {
    const float four[4] = {x[4 * leaf], x[4 * leaf + 1], x[4 * leaf + 2], x[4 * leaf + 3]};
    sums[leaf] = square_sum(four);
  }
  for (int count = width / 8; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  const float inverse = inverse_rms(sums[0], width, eps);
  for (int channel = 0; channel < width; ++channel) x[channel] = x[channel] * inverse * weight[channel];
}

void apply_rope(float* x, int width, const float* cos, const float* sin) {
  for (int channel = width - kRopeDim; channel < width; channel += 4) {
    float four[4] = {x[channel], x[channel + 1], x[channel + 2], x[channel + 3]};
    rotate_pairs(four, cos, sin, (channel - (width - kRopeDim)) / 2);
    for (int i = 0; i < 4; ++i) x[channel + i] = four[i];
  }
}

void hadamard_transform(float* x, int width) {
  for (int stride = 1; stride < width; stride *= 2) {
    for (int i = 0; i < width; ++i) {
      if ((i & stride) != 0) continue;
      const float low = x[i], high = x[i + stride];
      x[i] = low + high;
      x[i + stride] = low - high;
    }
  }
  for (int i = 0; i < width; ++i) x[i] *= kHadamardScale;
}

}  // namespace

void compress(const CompressParams& params) {
  const Compressor& compressor = params.compressor;
  const Tail& tail = compressor.tail;
  const int width = tail.width;
  const int64_t layer = *params.layer;
  std::vector<float> scratch;
  for (int row = 0; row < params.closing; ++row) {
    float* entry = params.entries + static_cast<int64_t>(row) * width;
    const int index = params.plan.closing(tail.geometry.ratio)[row];
    const Token closing = token_at(params.plan, index, tail.slots);
    if (!closing.valid || layer < 0 || layer >= tail.layers) {
      std::fill(entry, entry + width, 0.0f);
      continue;
    }
    (tail.running ? pool_running : pool_rows)(compressor, layer, closing, index, scratch, entry);
    normalize_row(entry, width, compressor.norm_weight, compressor.eps);
    apply_rope(entry, width, compressor.cos + row * (kRopeDim / 2), compressor.sin + row * (kRopeDim / 2));
    if (compressor.hadamard) hadamard_transform(entry, width);
  }
}

void normalize(const NormalizeParams& params) {
  for (int64_t row = 0; row < params.count; ++row) {
    float* x = params.out + row * kHeadDim;
    load_floats(params.rows, params.element, row * kHeadDim, kHeadDim, x);
    normalize_row(x, kHeadDim, params.norm.weight, params.norm.eps);
    apply_rope(x, kHeadDim, params.norm.cos + row * (kRopeDim / 2), params.norm.sin + row * (kRopeDim / 2));
  }
}

}  // namespace dsv4::cpu
