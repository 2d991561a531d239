// Exact top-k of a token's scores by a cluster of thread blocks; a thread holds up to kEach scores in registers, as
// numbers in their order.
//
// At least k groups of lanes are looked at for a bound: the least of their largest scores, which k scores reach. What
// reaches it is counted in bins of equal width in that order, over all blocks, and what lies in the bin of the k-th
// largest is counted in narrower bins, until so little does that it is listed and ranked, by score, then by id. Two or
// three rounds end in one score at the latest, of which the lowest ids are taken. What is chosen is a bit an entry, so
// that it leaves in the order of ids.
#pragma once

#include "cuda/core/barriers.cuh"
#include "math/index.h"

namespace dsv4::cuda::index {

constexpr int kSelectThreads = 1024;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr int kListed = 256;  // candidates that are ranked against each other
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// A bit for each entry of a block, 32 entries a word, and how many are set of 1024 entries each.
struct Marks {
  unsigned words[32][33];  // one more than is used: a warp writes a column
  int counts[32];
  int before;  // of what blocks before this one have set
};

struct SelectShared {
  int bins[kBins];
  int sums[kBins];         // over all blocks, if there are several
  int totals[kBins / 32];  // of 32 bins each, over all blocks
  uint64_t list[kListed];  // this block's candidates
  uint64_t all[kListed];   // every block's, if there are several
  uint2 ranges[kMostBlocks][32];
  Marks chosen, ties;
  int listed;
};

// The sum over the lanes up to this one.
__device__ __forceinline__ int sum_up_to(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWholeWarp, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// How many marks lie before a lane's word of the warp's 32.
__device__ __forceinline__ int marks_before(const Marks& marks, unsigned word) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, here = __popc(word);
  const int of_warps = static_cast<int>(__reduce_add_sync(kWholeWarp, lane < warp ? marks.counts[lane] : 0));
  return marks.before + of_warps + sum_up_to(here) - here;
}

template <int kCluster>
struct Cluster : ClusterBarrier<kCluster> {
  __device__ __forceinline__ static int rank() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1) return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#endif
    return 0;
  }

  // The same variable of another block.
  template <class T>
  __device__ __forceinline__ static T* of(int rank, T* own) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1) return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#endif
    return own;
  }
};

// Sums the bins of all blocks and makes the sums known to each. Returns where they are.
template <int kCluster>
__device__ __forceinline__ const int* sum_bins(SelectShared& s) {
  using Blocks = Cluster<kCluster>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Blocks::sync();
  if constexpr (kCluster == 1) {
#pragma unroll
    for (int group = 2 * warp; group < 2 * warp + 2; ++group) {
      const int total = __reduce_add_sync(kWholeWarp, s.bins[32 * group + lane]);
      if (lane == 0) s.totals[group] = total;
    }
    Blocks::sync();
    return s.bins;
  } else {
    constexpr int kGroups = kBins / 32 / kCluster;  // that this block sums
    if (warp < kGroups) {
      const int group = Blocks::rank() * kGroups + warp;
      int sum = 0;
#pragma unroll
      for (int r = 0; r < kCluster; ++r) sum += Blocks::of(r, s.bins)[32 * group + lane];
#pragma unroll
      for (int r = 0; r < kCluster; ++r) Blocks::of(r, s.sums)[32 * group + lane] = sum;
      const int total = __reduce_add_sync(kWholeWarp, sum);
      if (lane < kCluster) Blocks::of(lane, s.totals)[group] = total;
    }
    Blocks::sync();
    return s.sums;
  }
}

// The bin of the k-th largest: how many are above it, and in it.
struct Threshold {
  int bin, above, candidates;
};

// Every warp finds it for itself.
__device__ __forceinline__ Threshold find_threshold(const int* sums, const int* totals, int k) {
  const int lane = threadIdx.x % 32;
  const int upper = totals[63 - 2 * lane], lower = totals[62 - 2 * lane];
  int up_to = sum_up_to(upper + lower);
  int at = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, up_to >= k))) - 1;
  int above = __shfl_sync(kWholeWarp, up_to - upper - lower, at), group = 63 - 2 * at;
  const int of_upper = __shfl_sync(kWholeWarp, upper, at);
  if (above + of_upper < k) above += of_upper, --group;
  const int count = sums[32 * group + 31 - lane];
  up_to = above + sum_up_to(count);
  at = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, up_to >= k))) - 1;
  const int candidates = __shfl_sync(kWholeWarp, count, at);
  return {32 * group + 31 - at, __shfl_sync(kWholeWarp, up_to, at) - candidates, candidates};
}

// A cluster a token: grid tokens * kCluster, 1024 threads, 32 KB of shared memory, up to 64 registers a thread.
// Barriers: of the cluster after the range, twice for each round of bins, and after marks and lists.
template <int kEach, int kCluster>
__global__ void __launch_bounds__(kSelectThreads, 1) DSV4_CLUSTER_DIMS(kCluster)
    select_kernel(const __grid_constant__ IndexTopkParams params, int first_token) {
  using Blocks = Cluster<kCluster>;
  static_assert(kEach <= 32 && kCluster <= kMostBlocks && kBins / 32 == 64);
  if constexpr (Blocks::kCompiled) {
    __shared__ SelectShared s;
    const int rank = Blocks::rank(), thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row = blockIdx.x / kCluster, token = first_token + row, k = params.k;
    const float* const scores = params.every_score + row * params.capacity;
    const auto put = [&](int place, int entry) {
      const int64_t at = static_cast<int64_t>(token) * k + place;
      params.indices[at] = entry;
      if (params.scores != nullptr) params.scores[at] = entry >= 0 ? scores[entry] : -INFINITY;
    };
    Blocks::begin();
    for (int i = thread; i < kBins; i += kSelectThreads) s.bins[i] = 0;
    if (warp == 0) s.chosen.counts[lane] = 0, s.ties.counts[lane] = 0;
    if (thread == 0) s.chosen.before = 0, s.ties.before = 0, s.listed = 0;
    const int entries = entries_seen(params, token);
    if (entries <= k) {  // the same for the whole cluster
      for (int i = rank * kSelectThreads + thread; i < k; i += kCluster * kSelectThreads) {
        put(i, i < entries ? i : -1);
      }
      Blocks::wait();
      return;
    }

    // Score j of a thread is entry begin + 1024 j + thread. 0 is the number of what does not exist.
    const int span = (entries + 32 * kCluster - 1) / (32 * kCluster) * 32, begin = rank * span;
    const int here = min(entries - begin, span);
    uint32_t keys[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = j * kSelectThreads + thread;
      keys[j] = i < here ? ordered_score(scores[begin + i]) : 0u;
    }

    // Of every warp as many groups of lanes as make k groups in all; none has a bound where that is more than lanes.
    uint32_t high = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) high = max(high, keys[j]);
    uint32_t low = high;
    constexpr int kWarps = kCluster * kSelectThreads / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kWholeWarp, low, step);
      if (16 / step * kWarps >= k) low = max(low, other);
    }
    low = 32 * kWarps >= k ? low : 0u;
    low = __reduce_min_sync(kWholeWarp, low), high = __reduce_max_sync(kWholeWarp, high);
    Blocks::wait();
    if (lane < kCluster) Blocks::of(lane, &s)->ranges[rank][warp] = make_uint2(low, high);
    Blocks::sync();
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      const uint2 of_warp = s.ranges[r][lane];
      low = min(low, of_warp.x), high = max(high, of_warp.y);
    }
    low = max(__reduce_min_sync(kWholeWarp, low), 1u), high = __reduce_max_sync(kWholeWarp, high);

    // Candidates are the numbers low .. low + width; of what is above them so many are chosen that `wanted` are not.
    uint32_t width = high - low;
    int wanted = k, candidates = 0;
    while (true) {
      const int shift = max(32 - kBinBits - __clz(static_cast<int>(width)), 0);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t place = keys[j] - low;
        if (place <= width) atomicAdd(&s.bins[place >> shift], 1);
      }
      const int* const sums = sum_bins<kCluster>(s);
      const Threshold found = find_threshold(sums, s.totals, wanted);
      const uint32_t first = static_cast<uint32_t>(found.bin) << shift;
      low += first, width = min(width - first, (1u << shift) - 1u);
      wanted -= found.above, candidates = found.candidates;
      if (candidates <= kListed || width == 0u) break;
      __syncthreads();
      for (int i = thread; i < kBins; i += kSelectThreads) s.bins[i] = 0;
      __syncthreads();
    }
    const bool tied = candidates > kListed;  // all of them score alike

    // A warp's marks of 32 entries each: lane j keeps those of score j.
    unsigned chosen = 0u, ties = 0u;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const unsigned above = __ballot_sync(kWholeWarp, keys[j] > low + width);
      if (lane == j) chosen = above;
    }
    if (tied) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const unsigned alike = __ballot_sync(kWholeWarp, keys[j] == low);
        if (lane == j) ties = alike;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (keys[j] - low <= width) {
          s.list[atomicAdd(&s.listed, 1)] = choice_key(keys[j], begin + j * kSelectThreads + thread);
        }
      }
    }
    const auto mark = [&](Marks& marks, unsigned word) {
      const int count = __popc(word);
      if (lane < kEach) marks.words[lane][warp] = word;
      if (count != 0) atomicAdd(&marks.counts[lane], count);
      if constexpr (kCluster > 1) {
        const int of_warp = __reduce_add_sync(kWholeWarp, count);
        if (rank < lane && lane < kCluster && of_warp != 0) atomicAdd(Blocks::of(lane, &marks.before), of_warp);
      }
    };
    mark(s.chosen, chosen);
    if (tied) mark(s.ties, ties);
    Blocks::sync();

    const uint64_t* list = s.list;
    if constexpr (kCluster > 1) {
      if (!tied) {
        int before_block = 0;
#pragma unroll
        for (int r = 0; r < kCluster; ++r) {
          const int listed = *Blocks::of(r, &s.listed);
          if (thread < listed) s.all[before_block + thread] = Blocks::of(r, s.list)[thread];
          before_block += listed;
        }
        list = s.all;
      }
      Blocks::leave();
      __syncthreads();
    }
    if (!tied) {
      if (thread < candidates) {
        const uint64_t own = list[thread];
        int larger = 0;
#pragma unroll 4
        for (int i = 0; i < candidates; ++i) larger += list[i] > own;
        const int place = entry_of_choice(own) - begin;
        if (larger < wanted && place < 0) atomicAdd(&s.chosen.before, 1);
        if (larger < wanted && place >= 0 && place < here) {
          atomicOr(&s.chosen.words[place / 1024][place / 32 % 32], 1u << (place % 32));
          atomicAdd(&s.chosen.counts[place / 1024], 1);
        }
      }
      __syncthreads();
    }

    // A warp has 1024 entries, a lane 32.
    if (warp < kEach) {
      const unsigned sure = s.chosen.words[warp][lane], alike = tied ? s.ties.words[warp][lane] : 0u;
      const int first = begin + 1024 * warp + 32 * lane;
      int alike_before = tied ? marks_before(s.ties, alike) : 0;
      int place = marks_before(s.chosen, sure) + min(alike_before, wanted);
      for (unsigned left = sure | alike; left != 0u; left &= left - 1u) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        if ((sure >> bit & 1u) != 0u || alike_before++ < wanted) put(place++, first + bit);
      }
    }
    Blocks::wait();  // until nobody reads this block's shared memory any more
  }
}

}  // namespace dsv4::cuda::index
