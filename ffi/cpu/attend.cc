// Attention over stored rows on the host, one token after another: products in float32, sums over rows in double (a
// running float sum of 8,192 weights is off by ten units in the last place).

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "layout/attended.h"
#include "ops/signatures.h"

namespace dsv4::cpu {
namespace {

constexpr int kLanes = 16;  // sums side by side, so that compilers make vectors of them

// The rows that a token sees, dequantized one behind another.
class SeenRows {
 public:
  void read(const AttendParams& params, const AttendedRows& rows) {
    count_ = 0;
    values_.resize(static_cast<size_t>(rows.window + rows.entries) * kHeadDim);
    for (int number = 0; number < rows.window; ++number) read(params, rows, true, number);
    for (int number = 0; number < rows.entries; ++number) read(params, rows, false, number);
  }
  int count() const { return count_; }
  const float* operator[](int i) const { return values_.data() + static_cast<size_t>(i) * kHeadDim; }

 private:
  void read(const AttendParams& params, const AttendedRows& rows, bool in_window, int number) {
    Lookup lookup;
    look_up_first(params, rows, in_window, number, lookup);
    look_up_second(params, rows, in_window, number, lookup);
    const EntryPlace place = look_up_third(params, rows, in_window, number, lookup);
    if (place.page == nullptr) return;
    const bool displaced = in_window && lookup.first != window_position(rows, number);
    const Pool& pool = !in_window ? params.entries : displaced ? params.displaced : params.window;
    float* to = values_.data() + static_cast<size_t>(count_++) * kHeadDim;
    visit_codec(HeadCodecs{}, pool.codec, [&](auto codec) {
      using Codec = decltype(codec);
      load_row<Codec>(stored_row<Codec>(place.page, pool.rows, place.row), to, pool.global_scale);
    });
  }

  std::vector<float> values_;
  int count_ = 0;
};

float dot(const float* a, const float* b) {
  float sums[kLanes] = {};
  for (int channel = 0; channel < kHeadDim; channel += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[channel + lane] * b[channel + lane];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// Rotates the trailing channels back by the token's position.
void rotate_back(const AttendParams& params, int token, float* output) {
  if (params.cos == nullptr) return;
  constexpr int kPairs = kRopeDim / 2;
  for (int pair = 0; pair < kPairs; ++pair) {
    const float cos = params.cos[token * kPairs + pair], sin = params.sin[token * kPairs + pair];
    float* two = output + kHeadDim - kRopeDim + 2 * pair;
    const float x = two[0], y = two[1];
    two[0] = x * cos + y * sin;
    two[1] = y * cos - x * sin;
  }
}

// One head of one token; returns the log of the sum over exp(logits).
float attend_head(const AttendParams& params, const SeenRows& rows, const float* query, int head,
                  std::vector<float>& weights, float* output) {
  std::fill_n(output, kHeadDim, 0.0f);
  float peak = -std::numeric_limits<float>::infinity();
  weights.resize(rows.count());
  for (int i = 0; i < rows.count(); ++i) {
    weights[i] = dot(query, rows[i]) * params.scale;
    peak = weights[i] > peak ? weights[i] : peak;
  }
  if (rows.count() == 0) return peak;
  double total = 0.0, sums[kHeadDim] = {};
  for (int i = 0; i < rows.count(); ++i) {
    const float weight = std::exp(weights[i] - peak);
    total += weight;
    const float* row = rows[i];
    for (int channel = 0; channel < kHeadDim; ++channel) sums[channel] += weight * row[channel];
  }
  const float sink = params.sinks == nullptr ? 0.0f : std::exp(params.sinks[head] - peak);
  for (int channel = 0; channel < kHeadDim; ++channel) output[channel] = sums[channel] / (total + sink);
  return peak + static_cast<float>(std::log(total));
}

}  // namespace

void attend(const AttendParams& params) {
  SeenRows rows;
  std::vector<float> weights;
  float query[kHeadDim], output[kHeadDim];
  for (int token = 0; token < params.plan.tokens; ++token) {
    const AttendedRows attended = attended_rows(params, token);
    if (attended.valid) {
      rows.read(params, attended);
    } else {
      rows.read(params, AttendedRows{});
    }
    for (int head = 0; head < params.heads; ++head) {
      const int64_t place = static_cast<int64_t>(token) * params.heads + head;
      load_floats(params.queries, params.query_element, place * kHeadDim, kHeadDim, query);
      params.lse[place] = attend_head(params, rows, query, head, weights, output);
      rotate_back(params, token, output);
      if (attended.lacking) {
        params.lse[place] = std::numeric_limits<float>::quiet_NaN();
        std::fill_n(output, kHeadDim, params.lse[place]);
      }
      for (int channel = 0; channel < kHeadDim; ++channel) {
        if (params.output_element == Element::kFloat32) {
          static_cast<float*>(params.output)[place * kHeadDim + channel] = output[channel];
        } else {
          static_cast<bfloat16*>(params.output)[place * kHeadDim + channel] = from_float<bfloat16>(output[channel]);
        }
      }
    }
  }
}

}  // namespace dsv4::cpu
