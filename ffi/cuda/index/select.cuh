// Exact top-k of a token's scores by a cluster of thread blocks; a thread holds up to kEach neighbouring scores in
// registers.
//
// At least k groups of lanes are looked at for a bound: the least of their largest scores, which k scores reach. What
// reaches it is counted in bins of equal width in shared memory. Each block sums its slice of the bins of all blocks,
// so that only the slice with the k-th largest score is read by all. What lies in that score's bin is listed and ranked
// exactly, by score, then by id. What is chosen leaves in the order of ids.
#pragma once

#include "cuda/core/barriers.cuh"
#include "math/index.h"

namespace dsv4::cuda::index {

constexpr int kSelectThreads = 1024;
constexpr int kBins = 2048;
constexpr int kListed = 1024;  // candidates that are ranked against each other
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

struct SelectShared {
  int bins[kBins];
  int sums[kBins];         // of this block's slice, over all blocks
  uint64_t list[kListed];  // this block's candidates
  uint64_t all[kListed];   // every block's, in the order of blocks
  float bound[32], low[32], high[32];
  float range[3];
  int warps[32];
  int slice, listed, taken, equals, each, entries;
  int threshold, above, candidates;
  uint64_t cut;  // the smallest that is chosen
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

// The sum over the block's threads before this one; `warps` is shared memory.
__device__ __forceinline__ int sum_before(int x, int (&warps)[32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int here = sum_up_to(x);
  if (lane == 31) warps[warp] = here;
  __syncthreads();
  if (warp == 0) warps[lane] = sum_up_to(warps[lane]);
  __syncthreads();
  return here - x + (warp == 0 ? 0 : warps[warp - 1]);
}

// Of a set of scores: the bound, the least and the largest of them.
struct Range {
  float bound, low, high;

  __device__ __forceinline__ void over_warp() {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      bound = fminf(bound, __shfl_xor_sync(kWholeWarp, bound, step));
      low = fminf(low, __shfl_xor_sync(kWholeWarp, low, step));
      high = fmaxf(high, __shfl_xor_sync(kWholeWarp, high, step));
    }
  }
};

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

// A cluster a token: grid tokens * kCluster, 1024 threads, 33 KB of shared memory, up to 64 registers a thread.
// Barriers: of the cluster after the range, the bins, the slices' sums and the lists.
template <int kEach, int kCluster>
__global__ void __launch_bounds__(kSelectThreads, 1) DSV4_CLUSTER_DIMS(kCluster)
    select_kernel(const __grid_constant__ IndexTopkParams params, int first_token) {
  using Blocks = Cluster<kCluster>;
  if constexpr (Blocks::kCompiled) {
    __shared__ SelectShared s;
    const int rank = Blocks::rank(), thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row = blockIdx.x / kCluster, token = first_token + row, k = params.k;
    const auto score_at = [&](int entry) { return params.every_score + row * params.capacity + entry; };
    const int entries = entries_seen(params, token);
    const auto put = [&](int place, int entry) {
      const int64_t at = static_cast<int64_t>(token) * k + place;
      params.indices[at] = entry;
      if (params.scores != nullptr) params.scores[at] = entry >= 0 ? *score_at(entry) : -INFINITY;
    };
    if (entries <= k) {  // the same for the whole cluster
      for (int i = rank * kSelectThreads + thread; i < k; i += kCluster * kSelectThreads) {
        put(i, i < entries ? i : -1);
      }
      return;
    }
    constexpr int kFours = kCluster * kSelectThreads * 4;
    const int each = (entries + kFours - 1) / kFours * 4;
    const int first = (rank * kSelectThreads + thread) * each;
    const int mine = min(max(entries - first, 0), each);
    float x[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      float4 four = make_float4(NAN, NAN, NAN, NAN);
      if (i < mine) four = *reinterpret_cast<const float4*>(score_at(first + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }

    Range range{0.0f, kFloatMax, -INFINITY};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i < mine) range.low = fminf(range.low, x[i]), range.high = fmaxf(range.high, x[i]);
    }
    // Of every warp as many groups of lanes as make k groups in all; none has a bound where that is more than lanes.
    range.bound = k > kCluster * kSelectThreads ? -INFINITY : range.high;
    const int warps = kCluster * kSelectThreads / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_xor_sync(kWholeWarp, range.bound, step);
      range.bound = 16 / step * warps >= k ? fmaxf(range.bound, other) : fminf(range.bound, other);
    }
    range.over_warp();
    if (lane == 0) s.bound[warp] = range.bound, s.low[warp] = range.low, s.high[warp] = range.high;
    for (int i = thread; i < kBins; i += kSelectThreads) s.bins[i] = 0;
    if (thread == 0) s.slice = 0, s.listed = 0, s.taken = 0, s.equals = 0, s.each = each, s.entries = entries;
    __syncthreads();
    if (warp == 0) {
      range = {s.bound[lane], s.low[lane], s.high[lane]};
      range.over_warp();
      if (lane == 0) s.range[0] = range.bound, s.range[1] = range.low, s.range[2] = range.high;
    }
    Blocks::sync();
    const float* of_block = Blocks::of(lane % kCluster, s.range);
    range = {of_block[0], of_block[1], of_block[2]};
    if constexpr (kCluster > 1) range.over_warp();
    const float bound = range.bound, low = fmaxf(range.bound, range.low), high = range.high;
    // Read again, so that no register keeps it meanwhile.
    const int begin_of_block = Blocks::rank() * kSelectThreads * s.each;
    const int here = min(max(s.entries - begin_of_block - thread * s.each, 0), s.each);
    // A multiply-add rounds monotonically, so bins are in the order of scores. Beside 2^23 it rounds to whole numbers,
    // which are then the low bits. NaN and what does not fit become the lowest; what is below the bound counts for
    // none.
    constexpr float kLowest = 8388608.0f;
    const float width = high - low;
    const float factor = width > 0.0f ? fminf(static_cast<float>(kBins - 1) / width, 1e30f) : 0.0f;
    const float bias = fmaf(-low, factor, kLowest);
    uint32_t places[kEach / 2];  // bins, from 1 on, two to a word
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float place = fminf(fmaxf(fmaf(x[i], factor, bias), kLowest), kLowest + static_cast<float>(kBins - 1));
      const uint32_t bin = __float_as_uint(place) & (kBins - 1);
      const bool counts = i < here && !(x[i] < bound);
      if (counts) atomicAdd(&s.bins[bin], 1);
      const uint32_t one = counts ? bin + 1 : 0u;
      places[i / 2] = i % 2 == 0 ? one : places[i / 2] | one << 16;
    }
    Blocks::sync();

    // Bins from the top: this block's slice over all blocks, then the slice that the k-th largest is in.
    constexpr int kSlice = kBins / kCluster, kPer = kSlice > kSelectThreads ? kSlice / kSelectThreads : 1;
    int slice = 0, above = 0;
    int counts[kPer] = {};
    if constexpr (kCluster > 1) {
      int sum = 0;
      if (thread < kSlice) {
#pragma unroll
        for (int r = 0; r < kCluster; ++r) sum += Blocks::of(r, s.bins)[kBins - 1 - (Blocks::rank() * kSlice + thread)];
        s.sums[thread] = sum;
      }
      sum = __reduce_add_sync(kWholeWarp, sum);
      if (lane == 0 && sum != 0) atomicAdd(&s.slice, sum);
      Blocks::sync();
      const int total = lane < kCluster ? *Blocks::of(lane % kCluster, &s.slice) : 0, up_to = sum_up_to(total);
      slice = __ffs(static_cast<int>(__ballot_sync(kWholeWarp, lane < kCluster && up_to >= k))) - 1;
      above = __shfl_sync(kWholeWarp, up_to - total, slice);
      if (thread < kSlice) counts[0] = Blocks::of(slice, s.sums)[thread];
    } else {
#pragma unroll
      for (int i = 0; i < kPer; ++i) counts[i] = s.bins[kBins - 1 - (thread * kPer + i)];
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum += counts[i];
    int before = above + sum_before(sum, s.warps);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (before < k && before + counts[i] >= k) {
        s.threshold = kBins - 1 - (slice * kSlice + thread * kPer + i), s.above = before, s.candidates = counts[i];
      }
      before += counts[i];
    }
    __syncthreads();
    const uint32_t threshold = static_cast<uint32_t>(s.threshold) + 1;
    const int wanted = k - s.above, candidates = s.candidates;

    // What is above that bin, and what is in it: `wanted` of `candidates`.
    unsigned taken = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t place = i % 2 == 0 ? places[i / 2] & 0xFFFFu : places[i / 2] >> 16;
      taken |= static_cast<unsigned>(place > threshold) << i;
      equal |= static_cast<unsigned>(place == threshold) << i;
    }
    const int begin = begin_of_block + thread * s.each;
    const auto key_of = [&](int i) { return choice_key(*score_at(begin + i), begin + i); };
    int chosen_before = 0;  // of what blocks before this one choose
    if (candidates <= kListed) {
      const int sure = __reduce_add_sync(kWholeWarp, __popc(taken));
      if (lane == 0 && sure != 0) atomicAdd(&s.taken, sure);
      for (unsigned left = equal; left != 0u; left &= left - 1u) {
        s.list[atomicAdd(&s.listed, 1)] = key_of(__ffs(static_cast<int>(left)) - 1);
      }
      Blocks::sync();
      const uint64_t* all = s.list;
      if constexpr (kCluster > 1) {
        int before_block = 0;
#pragma unroll
        for (int r = 0; r < kCluster; ++r) {
          const int listed = *Blocks::of(r, &s.listed);
          if (thread < listed) s.all[before_block + thread] = Blocks::of(r, s.list)[thread];
          before_block += listed;
          if (r < Blocks::rank()) chosen_before += *Blocks::of(r, &s.taken);
        }
        Blocks::leave();
        all = s.all;
        __syncthreads();
      }
      if (thread < candidates) {
        const uint64_t own = all[thread];
        int larger = 0;
#pragma unroll 4
        for (int i = 0; i < candidates; ++i) larger += all[i] > own;
        if (larger == wanted - 1) s.cut = own;
      }
      __syncthreads();
      if constexpr (kCluster > 1) {
        const bool earlier = thread < candidates && all[thread] >= s.cut &&
                             static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(all[thread])) < begin_of_block;
        chosen_before += __syncthreads_count(earlier);
      }
    } else {
      // So many scores are alike: the bits of the cut, one after the other.
      uint64_t cut = 0;
      for (int bit = 63; bit >= 0; --bit) {
        const uint64_t trial = cut | uint64_t{1} << bit;
        int count = 0;
        for (unsigned left = equal; left != 0u; left &= left - 1u) {
          count += key_of(__ffs(static_cast<int>(left)) - 1) >= trial;
        }
        count = __reduce_add_sync(kWholeWarp, count);
        if (lane == 0 && count != 0) atomicAdd(&s.equals, count);
        Blocks::sync();
        int total = 0;
        for (int r = 0; r < kCluster; ++r) total += *Blocks::of(r, &s.equals);
        if (total >= wanted) cut = trial;
        Blocks::sync();
        if (thread == 0) s.equals = 0;
        __syncthreads();
      }
      if (thread == 0) s.cut = cut;
      int chosen_here = __popc(taken);
      for (unsigned left = equal; left != 0u; left &= left - 1u) {
        chosen_here += key_of(__ffs(static_cast<int>(left)) - 1) >= cut;
      }
      chosen_here = __reduce_add_sync(kWholeWarp, chosen_here);
      if (lane == 0 && chosen_here != 0) atomicAdd(&s.taken, chosen_here);
      Blocks::sync();
      for (int r = 0; r < Blocks::rank(); ++r) chosen_before += *Blocks::of(r, &s.taken);
      Blocks::leave();
    }
    const uint64_t cut = s.cut;
    for (unsigned left = equal; left != 0u; left &= left - 1u) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      if (key_of(i) >= cut) taken |= 1u << i;
    }
    int offset = chosen_before + sum_before(__popc(taken), s.warps);
    for (; taken != 0u; taken &= taken - 1u, ++offset) {
      put(offset, begin + __ffs(static_cast<int>(taken)) - 1);
    }
    Blocks::wait();  // until nobody reads this block's shared memory any more
  }
}

}  // namespace dsv4::cuda::index
