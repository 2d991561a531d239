// The indexer on any GPU: scores in fp32 arithmetic on dequantized keys, and top-k by the digits of scores in memory.
#pragma once

#include "cuda/core/decoders.cuh"
#include "math/index.h"

namespace dsv4::cuda::index {

constexpr int kPortableThreads = 128;  // a key each
constexpr int kPortableHeads = 64;     // at a time

// A block scores a share of a token's keys: grid (shares, tokens), 128 threads, 33 KB of shared memory, up to 255
// registers: a thread has all channels of its key.
template <class Codec>
__global__ void __launch_bounds__(kPortableThreads)
    portable_score_kernel(const __grid_constant__ IndexTopkParams params, int first_token) {
  __shared__ alignas(16) float queries[kPortableHeads][kKeyDim];
  __shared__ float weights[kPortableHeads];
  const int64_t token = first_token + blockIdx.y;
  const int entries = entries_seen(params, token), slot = params.plan.token_slot()[token];
  if (!needs_scores(params, entries)) return;
  float* const scores = params.every_score + blockIdx.y * params.capacity;
  for (int first_head = 0; first_head < params.heads; first_head += kPortableHeads) {
    const int heads = min(params.heads - first_head, kPortableHeads), head = threadIdx.x;
    __syncthreads();
    if (head < heads) {
      const int64_t row = token * params.heads + first_head + head;
      float x[kKeyDim];
#pragma unroll
      for (int i = 0; i < kKeyDim; ++i) {
        x[i] = params.element == Element::kFloat32
                   ? static_cast<const float*>(params.queries)[row * kKeyDim + i]
                   : to_float(static_cast<const bfloat16*>(params.queries)[row * kKeyDim + i]);
      }
      weights[head] = params.head_weights[row] * round_query(query_form<Codec>(), x, params.hadamard);
#pragma unroll
      for (int i = 0; i < kKeyDim; ++i) queries[head][i] = x[i];
    }
    __syncthreads();
    for (int entry = blockIdx.x * kPortableThreads + threadIdx.x; entry < entries;
         entry += gridDim.x * kPortableThreads) {
      const EntryPlace place = place_of_entry(params.pool, params.table, *params.layer, slot, entry);
      if (place.page == nullptr) {
        scores[entry] = __int_as_float(0x7FC00000);
        continue;
      }
      const StoredRow stored = stored_row<Codec>(place.page, params.pool.rows, place.row);
      float key[kKeyDim];
#pragma unroll
      for (int i = 0; i < kKeyDim; i += 4) {
        float four[4];
        const float scale = load_scale<Codec>(stored.scales, i, params.pool.global_scale);
        load_channels<Codec>(stored.data, i, four, scale);
#pragma unroll
        for (int c = 0; c < 4; ++c) key[i + c] = four[c];
      }
      float score = first_head == 0 ? 0.0f : scores[entry];
      for (int h = 0; h < heads; ++h) {
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < kKeyDim; i += 4) {
          const float4 q = *reinterpret_cast<const float4*>(queries[h] + i);
          sums[0] = fmaf(q.x, key[i], sums[0]), sums[1] = fmaf(q.y, key[i + 1], sums[1]);
          sums[2] = fmaf(q.z, key[i + 2], sums[2]), sums[3] = fmaf(q.w, key[i + 3], sums[3]);
        }
        const float dot = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        score = fmaf(weights[h], dot < 0.0f ? 0.0f : dot, score);  // a NaN stays one
      }
      scores[entry] = score;
    }
  }
}

constexpr int kDigitThreads = 1024;

// A block a token, however many entries it sees: the k-th best score digit after digit, each by a histogram of the
// scores that share the digits before; then ids in order. 1024 threads, 1.3 KB of shared memory.
static __global__ void __launch_bounds__(kDigitThreads)
    portable_select_kernel(const __grid_constant__ IndexTopkParams params, int first_token) {
  __shared__ int counts[256];
  __shared__ int warps[32];
  __shared__ int digit, left;
  const int64_t token = first_token + blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, k = params.k;
  const int entries = entries_seen(params, token);
  const float* scores = params.every_score + blockIdx.x * params.capacity;
  int32_t* const out = params.indices + token * k;
  float* const chosen = params.scores == nullptr ? nullptr : params.scores + token * k;
  uint32_t cut = 0;
  int wanted = entries <= k ? 0 : k;  // of those that score like the cut
  for (int shift = 24; entries > k && shift >= 0; shift -= 8) {
    if (thread < 256) counts[thread] = 0;
    __syncthreads();
    for (int i = thread; i < entries; i += kDigitThreads) {
      const uint32_t score = ordered_score(scores[i]);
      if (static_cast<uint64_t>(score) >> (shift + 8) == static_cast<uint64_t>(cut) >> (shift + 8)) {
        atomicAdd(counts + (score >> shift & 255u), 1);
      }
    }
    __syncthreads();
    if (thread == 0) {
      int rest = wanted, place = 255;
      for (; place > 0 && counts[place] < rest; --place) rest -= counts[place];
      digit = place, left = rest;
    }
    __syncthreads();
    cut |= static_cast<uint32_t>(digit) << shift, wanted = left;
    __syncthreads();
  }
  int above_before = 0, equal_before = 0;
  for (int first = 0; first < entries; first += kDigitThreads) {
    const int entry = first + thread;
    const uint32_t score = entry < entries && entries > k ? ordered_score(scores[entry]) : 0u;
    const bool above = entry < entries && (entries <= k || score > cut);
    const bool equal = entry < entries && entries > k && score == cut;
    const unsigned aboves = __ballot_sync(0xFFFFFFFFu, above), equals = __ballot_sync(0xFFFFFFFFu, equal);
    if (lane == 0) warps[warp] = __popc(equals) << 16 | __popc(aboves);
    __syncthreads();
    int before = 0, all = 0;
    for (int i = 0; i < 32; ++i) before += i < warp ? warps[i] : 0, all += warps[i];
    const unsigned lower = (1u << lane) - 1u;
    const int above_here = above_before + (before & 0xFFFF) + __popc(aboves & lower);
    const int equal_here = equal_before + (before >> 16) + __popc(equals & lower);
    if (above || (equal && equal_here < wanted)) {
      const int place = above_here + min(equal_here, wanted);
      out[place] = entry;
      if (chosen != nullptr) chosen[place] = scores[entry];
    }
    above_before += all & 0xFFFF, equal_before += all >> 16;
    __syncthreads();
  }
  for (int i = entries + thread; i < k; i += kDigitThreads) {
    out[i] = -1;
    if (chosen != nullptr) chosen[i] = -INFINITY;
  }
}

}  // namespace dsv4::cuda::index
