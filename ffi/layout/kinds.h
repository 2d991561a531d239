// The kinds of compression, one row each: everything that differs between them is read here. dsv4_jax/spec/kinds.py
// holds the same rows.
#pragma once

#include <cstdint>

#include "layout/bits.h"

namespace dsv4 {

constexpr int kHeadDim = 512;
constexpr int kRopeDim = 64;
constexpr int kKeyDim = 128;
constexpr int kBlockTokens = 128;  // a multiple of every ratio

constexpr int kCsaRatio = 4;
constexpr int kHcaRatio = 128;

// How a layer compresses its context. Kinds are told apart by their ratio.
struct Kind {
  const char* name;
  int ratio;           // tokens per entry
  bool overlap;        // an entry pools the window before its own too, from columns of their own
  bool gate;           // entries are weighted by a softmax over gates
  bool position_bias;  // gates get a bias by the token's place in its window
  bool indexed;        // it has indexer keys beside its entries
};

// A struct and no array, so that device code, which cannot read the host's constants, makes one of its own; the loops
// over it unroll to nothing.
struct KindTable {
  static constexpr int kCount = 2;
  Kind rows[kCount] = {
      {"csa", kCsaRatio, true, true, true, true},
      {"hca", kHcaRatio, false, true, true, false},
  };
};

// Whether there is a kind of this ratio.
DSV4_HOST_DEVICE constexpr bool is_ratio(int64_t ratio) {
  constexpr KindTable table{};
  for (const Kind& kind : table.rows) {
    if (kind.ratio == ratio) return true;
  }
  return false;
}

// Whether entries of the kind of this ratio overlap.
DSV4_HOST_DEVICE constexpr bool entries_overlap(int ratio) {
  constexpr KindTable table{};
  for (const Kind& kind : table.rows) {
    if (kind.ratio == ratio) return kind.overlap;
  }
  return false;
}

DSV4_HOST_DEVICE constexpr int entries_per_block(int ratio) { return kBlockTokens / ratio; }

}  // namespace dsv4
