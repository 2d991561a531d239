// The running tail on the host: a window's state, and tokens folded into it.
#pragma once

#include <algorithm>

#include "cpu/rows.h"
#include "layout/window_rows.h"
#include "math/pooling.h"

namespace dsv4::cpu {

// As before the first token of a window.
inline void clear_state(float* state, int width) {
  std::fill(state, state + width, kEmptyPartial.max);
  std::fill(state + width, state + 2 * width, kEmptyPartial.denominator);
  std::fill(state + 2 * width, state + 3 * width, kEmptyPartial.sum);
}

inline SoftmaxPartial partial_of(const float* state, int width, int channel) {
  return {state[channel], state[width + channel], state[2 * width + channel]};
}

// Folds tokens of a step into a state [3, width].
inline void fold_tokens(const Projections& in, const WindowTokens& tokens, int width, float* state) {
  for (int i = 0; i < tokens.count; ++i) {
    const int64_t projection = static_cast<int64_t>(tokens.index + i) * in.columns;
    const float* position_bias =
        in.position_bias + static_cast<int64_t>((tokens.position + i) % kHcaRatio) * in.columns;
    for (int channel = 0; channel < width; ++channel) {
      const SoftmaxPartial folded =
          fold(partial_of(state, width, channel), element(in.kv, in.element, projection + channel),
               element(in.gate, in.element, projection + channel) + position_bias[channel]);
      state[channel] = folded.max, state[width + channel] = folded.denominator, state[2 * width + channel] = folded.sum;
    }
  }
}

}  // namespace dsv4::cpu
