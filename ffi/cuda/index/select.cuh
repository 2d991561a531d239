// Exact top-k of a token's scores by a cluster of thread blocks, each with a share of them in its shared memory, as
// numbers in their order.
//
// At least k groups of scores are looked at for a bound: the least of their largest, which k scores reach. What reaches
// it is counted in bins of equal width in that order, over all blocks, and what lies in the bin of the k-th largest is
// counted in narrower bins, until so little does that it is listed and ranked, by score, then by id. Three rounds end
// in one score at the latest, of which the lowest ids are taken. Then a thread has neighbouring entries, so that what
// is chosen leaves in the order of ids.
#pragma once

#include "cuda/core/barriers.cuh"
#include "cuda/core/early_launch.cuh"
#include "math/index.h"

namespace dsv4::cuda::index {

constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr int kGroupBins = 128, kGroups = kBins / kGroupBins;  // four bins a lane
constexpr int kListed = 256;                                   // candidates that are ranked against each other
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// The bin of the k-th largest: how many are above it, and in it.
struct Threshold {
  int bin, above, candidates;
};

// Behind it the block's scores lie.
struct SelectShared {
  int4 bins[kBins / 4 + 1];  // the last one is for what no bin is for
  int4 sums[kBins / 4];      // over all blocks, if there are several
  int totals[kGroups];       // of a group of bins each, over all blocks
  uint64_t list[kListed];    // this block's candidates
  uint64_t all[kListed];     // every block's, if there are several
  uint64_t cut;              // the least that is chosen of them
  uint2 ranges[kMostBlocks][32];
  int chosen[32], alike[32];        // of warps
  int chosen_before, alike_before;  // of blocks before this one: what is surely chosen, and alike
  int listed;
  Threshold threshold;
};

// Numbers in the order of scores; NaN comes below all, as 0. A difference makes both zeros one, and its NaN is positive
// on the device.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = __float_as_uint(0.0f - score);
  return bits ^ (~static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) & 0x7FFFFFFFu);
}

// The lowest bit of a mask, and how many it has.
__device__ __forceinline__ int lowest(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }
__device__ __forceinline__ int lowest(uint64_t mask) { return __ffsll(static_cast<long long>(mask)) - 1; }
__device__ __forceinline__ int count_of(uint32_t mask) { return __popc(mask); }
__device__ __forceinline__ int count_of(uint64_t mask) { return __popcll(mask); }

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

// The sum over the block's threads before this one; `warps` is shared memory.
__device__ __forceinline__ int sum_before(int x, int (&warps)[32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int up_to = sum_up_to(x);
  if (lane == 31) warps[warp] = up_to;
  __syncthreads();
  return static_cast<int>(__reduce_add_sync(kWholeWarp, lane < warp ? warps[lane] : 0)) + up_to - x;
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
template <int kThreads, int kCluster>
__device__ __forceinline__ const int4* sum_bins(SelectShared& s) {
  using Blocks = Cluster<kCluster>;
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Blocks::sync();
  // Groups of bins are spread over the blocks.
  for (int group = warp * kCluster + Blocks::rank(); group < kGroups; group += kWarps * kCluster) {
    const int at = 32 * group + lane;
    int4 sum = s.bins[at];
    if constexpr (kCluster > 1) {
      sum = make_int4(0, 0, 0, 0);
#pragma unroll
      for (int r = 0; r < kCluster; ++r) {
        const int4 of_block = Blocks::of(r, s.bins)[at];
        sum.x += of_block.x, sum.y += of_block.y, sum.z += of_block.z, sum.w += of_block.w;
      }
#pragma unroll
      for (int r = 0; r < kCluster; ++r) Blocks::of(r, s.sums)[at] = sum;
    }
    const int total = __reduce_add_sync(kWholeWarp, sum.x + sum.y + sum.z + sum.w);
    if (lane < kCluster) Blocks::of(lane, s.totals)[group] = total;
  }
  Blocks::sync();
  return kCluster == 1 ? s.bins : s.sums;
}

// By one warp; at least k are counted.
__device__ __forceinline__ void find_threshold(Threshold& found, const int4* sums, const int* totals, int k) {
  const int lane = threadIdx.x % 32;
  const int total = lane < kGroups ? totals[kGroups - 1 - lane] : 0;
  int up_to = sum_up_to(total);
  int at = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, up_to >= k))) - 1;
  const int above = __shfl_sync(kWholeWarp, up_to - total, at), four = 32 * (kGroups - 1 - at) + 31 - lane;
  const int4 counts = sums[four];
  const int sum = counts.x + counts.y + counts.z + counts.w;
  up_to = above + sum_up_to(sum);
  at = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, up_to >= k))) - 1;
  if (lane != at) return;
  int before = up_to - sum, bin = 4 * four + 3, candidates = counts.w;
  if (before + candidates < k) before += candidates, candidates = counts.z, --bin;
  if (before + candidates < k) before += candidates, candidates = counts.y, --bin;
  if (before + candidates < k) before += candidates, candidates = counts.x, --bin;
  found = {bin, before, candidates};
}

// A cluster a token; a thread has as many entries as a Mask has bits: grid tokens * kCluster, shared memory
// `select_bytes`. Barriers: of the cluster after the range, twice for each round of bins, and after lists; of the block
// after a threshold, its cut and the counts of warps. It waits for scores where it wants them, so it may be launched
// early.
template <int kThreads, int kCluster, class Mask>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) DSV4_CLUSTER_DIMS(kCluster)
    select_kernel(const __grid_constant__ IndexTopkParams params, int first_token) {
  using Blocks = Cluster<kCluster>;
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads >= kListed && kThreads <= 1024 && kCluster <= kMostBlocks);
  if constexpr (Blocks::kCompiled) {
    extern __shared__ __align__(16) uint8_t raw_shared[];
    auto& s = *reinterpret_cast<SelectShared*>(raw_shared);
    auto* const fours = reinterpret_cast<uint4*>(raw_shared + sizeof(SelectShared));
    auto* const bins = reinterpret_cast<int*>(s.bins);
    const int rank = Blocks::rank(), thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row = blockIdx.x / kCluster, token = first_token + row, k = params.k;
    const float* const scores = params.every_score + row * params.capacity;
    const auto put = [&](int place, int entry) {
      const int64_t at = static_cast<int64_t>(token) * k + place;
      params.indices[at] = entry;
      if (params.scores != nullptr) params.scores[at] = entry >= 0 ? scores[entry] : -INFINITY;
    };
    const auto clear_bins = [&] {
      for (int i = thread; i < kBins / 4; i += kThreads) s.bins[i] = make_int4(0, 0, 0, 0);
    };
    Blocks::begin();
    clear_bins();
    if (thread == 0) s.chosen_before = 0, s.alike_before = 0, s.listed = 0;
    const int entries = entries_seen(params, token);
    await_kernel_ahead();
    if (entries <= k) {  // the same for the whole cluster
      for (int i = rank * kThreads + thread; i < k; i += kCluster * kThreads) put(i, i < entries ? i : -1);
      Blocks::wait();
      return;
    }

    // This block's are entries begin .. begin + here - 1, four a chunk. Behind the last one zeros fill a chunk: like
    // NaN, but of higher ids than any.
    const int span = (entries + 32 * kCluster - 1) / (32 * kCluster) * 32, begin = rank * span;
    const int here = max(min(entries - begin, span), 0), chunks = (here + 3) / 4;
    uint32_t high = 0;
    constexpr int kBatch = kCluster == 1 ? 8 : 4;  // reads under way
#pragma unroll 1
    for (int first = thread; first < chunks; first += kBatch * kThreads) {
      float4 read[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int chunk = first + i * kThreads;
        if (chunk < chunks) read[i] = reinterpret_cast<const float4*>(scores + begin)[chunk];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int chunk = first + i * kThreads, left = here - 4 * chunk;
        if (left <= 0) break;
        uint4 four = {order_of(read[i].x), order_of(read[i].y), order_of(read[i].z), order_of(read[i].w)};
        if (left < 4) four.w = 0u, four.z = left < 3 ? 0u : four.z, four.y = left < 2 ? 0u : four.y;
        high = max(max(high, max(four.x, four.y)), max(four.z, four.w));
        fours[chunk] = four;
      }
    }

    // Of every warp as many groups of lanes as make k groups in all; none has a bound where that is more than lanes.
    uint32_t low = high;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kWholeWarp, low, step);
      if (16 / step * kWarps * kCluster >= k) low = max(low, other);
    }
    low = kThreads * kCluster >= k ? low : 0u;
    low = __reduce_min_sync(kWholeWarp, low), high = __reduce_max_sync(kWholeWarp, high);
    Blocks::wait();
    if (lane < kCluster) Blocks::of(lane, &s)->ranges[rank][warp] = make_uint2(low, high);
    Blocks::sync();
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      const uint2 of_warp = s.ranges[r][lane % kWarps];
      low = min(low, of_warp.x), high = max(high, of_warp.y);
    }
    low = __reduce_min_sync(kWholeWarp, low), high = __reduce_max_sync(kWholeWarp, high);

    // Bins are the numbers that agree but for their last `shift` bits, from `base` on. Of what is above them so many
    // are chosen that `wanted` are not.
    int shift = max(32 - kBinBits - __clz(static_cast<int>(high - low)), 0), wanted = k, candidates = 0;
    if ((high >> shift) - (low >> shift) >= kBins) ++shift;
    uint32_t base = low >> shift, used = (high >> shift) - base + 1;
    while (true) {
#pragma unroll 2
      for (int chunk = thread; chunk < chunks; chunk += kThreads) {
        const uint4 four = fours[chunk];
        const auto count = [&](uint32_t number) {
          const uint32_t bin = (number >> shift) - base;
          atomicAdd(bins + (bin < used ? bin : kBins), 1);  // a branch would take longer
        };
        count(four.x), count(four.y), count(four.z), count(four.w);
      }
      const int4* const sums = sum_bins<kThreads, kCluster>(s);
      if (warp == 0) find_threshold(s.threshold, sums, s.totals, wanted);
      __syncthreads();
      base += s.threshold.bin, wanted -= s.threshold.above, candidates = s.threshold.candidates;
      if (candidates <= kListed || shift == 0) break;
      const int finer = max(shift - kBinBits, 0);
      base <<= shift - finer, used = 1u << (shift - finer), shift = finer;
      clear_bins();
      __syncthreads();
    }
    const bool tied = candidates > kListed;  // all of them score alike

    // A bit for each of this thread's neighbouring entries: what is chosen if its turn comes, and candidates. Threads
    // begin at different chunks where they would meet on a bank.
    const int each = (chunks + kThreads - 1) / kThreads, first = thread * each, mine = min(chunks - first, each);
    const int turn = (each & (each - 1)) == 0 ? thread * each / 8 & (each - 1) : 0;
    Mask chosen = 0, alike = 0;
    const uint32_t least = base << shift, largest = least | ((1u << shift) - 1u);
#pragma unroll 2
    for (int i = 0; i < each; ++i) {
      const int chunk = i ^ turn;
      if (chunk < mine) {
        const uint4 four = fours[first + chunk];
        unsigned reached = four.x >= least ? 1u : 0u;
        if (four.y >= least) reached |= 2u;
        if (four.z >= least) reached |= 4u;
        if (four.w >= least) reached |= 8u;
        chosen |= static_cast<Mask>(reached) << (4 * chunk);
      }
    }
    const int first_entry = begin + 4 * first;
    const auto* const numbers = reinterpret_cast<const uint32_t*>(fours + first);
    for (Mask left = chosen; left != 0; left &= left - 1) {
      const int bit = lowest(left);
      if (numbers[bit] <= largest) {
        alike |= Mask{1} << bit;
        if (!tied) s.list[atomicAdd(&s.listed, 1)] = choice_key(numbers[bit], first_entry + bit);
      }
    }
    if constexpr (kCluster > 1) {
      const int sure_here = __reduce_add_sync(kWholeWarp, count_of(chosen & ~alike)),
                alike_here = __reduce_add_sync(kWholeWarp, count_of(alike));
      if (rank < lane && lane < kCluster) {
        if (sure_here != 0) atomicAdd(Blocks::of(lane, &s.chosen_before), sure_here);
        if (tied && alike_here != 0) atomicAdd(Blocks::of(lane, &s.alike_before), alike_here);
      }
    }
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
    // Of the candidates `wanted` stay.
    if (tied) {
      int before = s.alike_before + sum_before(count_of(alike), s.alike);
      for (Mask left = alike; left != 0; left &= left - 1) {
        if (before++ >= wanted) chosen &= ~(left & (~left + 1));
      }
    } else {
      if (thread < candidates) {
        const uint64_t own = list[thread];
        int larger = 0;
#pragma unroll 4
        for (int i = 0; i < candidates; ++i) larger += list[i] > own;
        if (larger == wanted - 1) s.cut = own;
        if (larger < wanted && entry_of_choice(own) < begin) atomicAdd(&s.chosen_before, 1);
      }
      __syncthreads();
      for (Mask left = alike; left != 0; left &= left - 1) {
        const int bit = lowest(left);
        if (choice_key(numbers[bit], first_entry + bit) < s.cut) chosen &= ~(Mask{1} << bit);
      }
    }
    int place = s.chosen_before + (tied ? min(s.alike_before, wanted) : 0) + sum_before(count_of(chosen), s.chosen);
    for (; chosen != 0; chosen &= chosen - 1) put(place++, first_entry + lowest(chosen));
    Blocks::wait();  // until nobody reads this block's shared memory any more
  }
}

// Dynamic shared memory of a block of `kCluster` for rows of `capacity` scores.
constexpr int select_bytes(int64_t capacity, int cluster) {
  return static_cast<int>(sizeof(SelectShared) + (capacity + 32 * cluster - 1) / (32 * cluster) * 128);
}

}  // namespace dsv4::cuda::index
