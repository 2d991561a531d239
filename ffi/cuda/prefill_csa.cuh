// Prefill, CSA: a block closes a run of windows, copying the next while it finishes one. Four warps make the entries,
// one the indexer keys, and the last looks the windows up and stores rows that survive.
#pragma once

#include "landing.cuh"
#include "prefill.cuh"

namespace dsv4::cuda {

constexpr int kPoolThreads = kRowThreads + kWarp;
constexpr int kRunThreads = kPoolThreads + kWarp;
constexpr int kLongestRun = kWarp - 1;

// The barrier behind which windows are looked up: one warp arrives, the others wait for it.
constexpr int kLookUpBarrier = 1;

__device__ __forceinline__ void arrive(int barrier, int threads) {
  __syncwarp();
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <class T>
constexpr int kRunBlocks = sizeof(T) == 4 ? 2 : 3;  // that fit on a multiprocessor

template <class T>
constexpr int kRunBytes = kPoolThreads / kWarp * Landing<kHeadDim, T>::kBytes;

// How the rows of the step's list of closing windows are spread over blocks. Runs differ by one window, but the first
// is shorter by `head`: a step of one request has there what pools rows of the tail, which takes longer.
struct Runs {
  static constexpr int kHead = 2;

  int rows;
  int each;
  int longer;  // blocks whose run is longer by one
  int head;

  Runs(int rows, int blocks) : rows(rows), head(rows / blocks > kHead ? kHead : 0) {
    each = (rows + head) / blocks, longer = (rows + head) % blocks;
  }

  __device__ __forceinline__ int first(int block) const {
    return block == 0 ? 0 : block * each + min(block, longer) - head;
  }
};

// The rows of that list that a block closes.
struct Run {
  int first;
  int count;
  bool more;  // another row comes behind

  __device__ __forceinline__ Run(const Runs& runs, int block)
      : first(runs.first(block)), count(runs.first(block + 1) - first), more(first + count < runs.rows) {}
};

// The windows that pool rows of a request's tail, two at most, are closed by one block, which then moves the tail on.
// So a run leaves its first window to the block before, and takes one more, where that is the request's second such
// window.
__device__ __forceinline__ void look_up_run(const UpdateParams& params, const Run& run, ClosingWindow* windows,
                                            int place) {
  if (place >= run.count + run.more) return;
  ClosingWindow window = look_up<kCsaRatio>(params, run.first + place);
  const bool second =
      window.kind == ClosingWindow::kTail && window.closing.position - kCsaRatio >= window.closing.start;
  if ((place == 0 && second) || (place == run.count && !second)) window.kind = ClosingWindow::kNone;
  windows[place] = window;
}

template <int W, class T>
__device__ __forceinline__ void close_run(const UpdateParams& params, const Compression& part, const Run& run,
                                          const ClosingWindow* windows, char* landing, const RowThreads<W>& threads) {
  using Rows = Landing<W, T>;
  const Compressor compressor = with_constants<W, kCsaRatio>(part.compressor);
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const Projections& in = compressor.projections;
  const int channel = threads.channel(), lane = threads.thread % kWarp;
  const Rows landed{landing};
  // Whether a window is valid, and where its rows are, is known later: rows of this step can be read at any rate.
  const auto copy = [&](int index) {
    if (index >= kGroupRows - 1 && index < params.window.plan.tokens) {
      landed.copy(in, index - (kGroupRows - 1), channel - 4 * lane, lane);
    }
  };
  const auto closing = params.window.plan.closing(kCsaRatio) + run.first;
  int64_t angles = static_cast<int64_t>(run.first) * (kRopeDim / 2);
  Finish finish;
  load_early(compressor.norm_weight + channel, finish.weight);
  copy(run.count > 0 ? closing[0] : -1);
  sync_threads(kLookUpBarrier, kRunThreads);

#pragma unroll 1
  for (int place = 0; place < run.count + run.more; ++place) {
    const ClosingWindow& window = windows[place];
    finish.load_angles<W>(compressor.cos + angles, compressor.sin + angles, channel);
    angles += kRopeDim / 2;
    float bias[kGroupRows][4];
    Rows::load_bias(in, channel, bias);
    wait_copies();
    Partials<4> partial;
    if (window.kind == ClosingWindow::kStep) partial = landed.pool(bias, lane);
    __syncwarp();
    copy(place + 1 < run.count ? windows[place + 1].index : -1);
    if (window.kind == ClosingWindow::kNone) continue;
    if (window.kind == ClosingWindow::kTail) {
      const int64_t layer = *params.kind_layer;
      const Token token = window.closing;
      partial = pool_rows<W, kCsaRatio, T>(compressor.tail, in, layer, token, window.index, 0, channel);
      Token later = token;
      later.position += kCsaRatio;
      const bool another = !all_in_step<kCsaRatio>(later) && later.position < later.next;
      if (!another && token.start > 0) {
        move_tail_on<kCsaRatio, 1, 2, T>(compressor, layer, token, window.index, 0, channel);
      }
    }
    float x[4];
    finish_csa_entry(compressor, finish, partial, threads, x);
    const float row_amax = threads.max(amax_for<W>(pool, x, channel));
    store_entry<W>(pool, {W == kHeadDim ? window.entry_page : window.key_page, window.row}, x, channel, row_amax);
  }
}

template <class RowT, class T>
__global__ void __launch_bounds__(kRunThreads, kRunBlocks<T>)
    prefill_csa_kernel(const __grid_constant__ UpdateParams params, Runs runs, LastTokens last) {
  extern __shared__ uint4 landings[];
  __shared__ ClosingWindow windows[kLongestRun + 1];
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int thread = threadIdx.x;
  const Run run(runs, blockIdx.x);
  if (thread >= kPoolThreads) {
    look_up_run(params, run, windows, thread % kWarp);
    arrive(kLookUpBarrier, kRunThreads);
    append_last_tokens<RowT, T, kCsaRatio>(params, last, blockIdx.x, gridDim.x, thread % kWarp);
    return;
  }
  char* landing = reinterpret_cast<char*>(landings) + thread / kWarp * Landing<kHeadDim, T>::kBytes;
  if (thread < kRowThreads) {
    close_run<kHeadDim, T>(params, params.entries, run, windows, landing, {thread, 2, scratch});
  } else {
    close_run<kKeyDim, T>(params, params.keys, run, windows, landing, {thread % kWarp, 0, nullptr});
  }
}

}  // namespace dsv4::cuda
