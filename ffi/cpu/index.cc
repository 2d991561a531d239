// The indexer on the host: scores of the entries that a token sees, and the best of them.

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "layout/places.h"
#include "math/index.h"
#include "ops/signatures.h"

namespace dsv4::cpu {
namespace {

constexpr int kTogether = 16;  // heads side by side, so that sums stay in registers

// A token's rounded queries, channel after channel, the heads of each side by side, and the weights of their scores.
struct Queries {
  int heads;  // rounded up; weights are 0 from the last on
  std::vector<float> channels, weights;

  Queries(const IndexTopkParams& params, QueryForm form, int64_t token)
      : heads((params.heads + kTogether - 1) / kTogether * kTogether),
        channels(static_cast<size_t>(heads) * kKeyDim, 0.0f),
        weights(heads, 0.0f) {
    for (int head = 0; head < params.heads; ++head) {
      float x[kKeyDim];
      const int64_t row = token * params.heads + head;
      load_floats(params.queries, params.element, row * kKeyDim, kKeyDim, x);
      weights[head] = params.head_weights[row] * round_query(form, x, params.hadamard);
      for (int channel = 0; channel < kKeyDim; ++channel) channels[channel * heads + head] = x[channel];
    }
  }

  float score(const float* key, int real_heads) const {
    float score = 0.0f;
    for (int first = 0; first < heads; first += kTogether) {
      float sums[kTogether] = {};
      for (int channel = 0; channel < kKeyDim; ++channel) {
        const float* of_heads = channels.data() + channel * heads + first;
        for (int i = 0; i < kTogether; ++i) sums[i] += key[channel] * of_heads[i];
      }
      for (int i = 0; i < kTogether && first + i < real_heads; ++i) {
        score += weights[first + i] * (sums[i] < 0.0f ? 0.0f : sums[i]);  // a NaN stays one
      }
    }
    return score;
  }
};

// Scores of a token's first `entries` entries; one without a block scores NaN.
template <class Codec>
void score_entries(const IndexTopkParams& params, int64_t token, int entries, float* scores) {
  const Queries queries(params, query_form<Codec>(), token);
  const int slot = params.plan.token_slot()[token];
  for (int entry = 0; entry < entries; ++entry) {
    const EntryPlace place = place_of_entry(params.pool, params.table, *params.layer, slot, entry);
    if (place.page == nullptr) {
      scores[entry] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    float key[kKeyDim];
    load_row<Codec>(stored_row<Codec>(place.page, params.pool.rows, place.row), key, params.pool.global_scale);
    scores[entry] = queries.score(key, params.heads);
  }
}

}  // namespace

void index_topk(const IndexTopkParams& params) {
  visit_codec(params.pool.width, params.pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    if constexpr (Codec::kWidth == kKeyDim) {
      std::vector<float> scores(params.capacity);
      std::vector<uint64_t> keys(params.capacity);
      for (int64_t token = 0; token < params.plan.tokens; ++token) {
        const int entries = entries_seen(params, token), chosen = std::min(entries, params.k);
        if (needs_scores(params, entries)) score_entries<Codec>(params, token, entries, scores.data());
        int32_t* const ids = params.indices + token * params.k;
        std::fill_n(ids, params.k, -1);
        if (entries <= params.k) {
          for (int i = 0; i < entries; ++i) ids[i] = i;
        } else {
          for (int i = 0; i < entries; ++i) keys[i] = choice_key(ordered_score(scores[i]), i);
          std::nth_element(keys.begin(), keys.begin() + (chosen - 1), keys.begin() + entries, std::greater<>());
          for (int i = 0; i < chosen; ++i) ids[i] = entry_of_choice(keys[i]);
          std::sort(ids, ids + chosen);
        }
        if (params.scores == nullptr) continue;
        for (int i = 0; i < params.k; ++i) {
          params.scores[token * params.k + i] = i < chosen ? scores[ids[i]] : -std::numeric_limits<float>::infinity();
        }
      }
    }
  });
}

}  // namespace dsv4::cpu
