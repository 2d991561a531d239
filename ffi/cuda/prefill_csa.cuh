// Prefill, CSA: a block closes a run of windows, copying the next two while it pools one. Four warps make the entries,
// one the indexer keys, and the last looks the windows up and stores rows that survive.
#pragma once

#include "prefill.cuh"

namespace dsv4::cuda {

constexpr int kPoolThreads = kRowThreads + kWarp;
constexpr int kRunThreads = kPoolThreads + kWarp;
constexpr int kLongestRun = kWarp - 1;
constexpr int kAhead = 2;

template <class T>
constexpr int kRunBlocks = sizeof(T) == 4 ? 2 : 3;  // that fit on a multiprocessor

template <class T>
constexpr int kRunBytes = kAhead * (kPoolThreads / kWarp) * Landing<kHeadDim, kCsaRatio, T>::kBytes;

// The rows of the step's list of closing windows that a block closes.
struct Run {
  int first;
  int count;
  bool more;  // another row comes behind

  __device__ Run(int rows)
      : first(static_cast<int>(int64_t{rows} * blockIdx.x / gridDim.x)),
        count(static_cast<int>(int64_t{rows} * (blockIdx.x + 1) / gridDim.x) - first),
        more(first + count < rows) {}
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
  using Rows = Landing<W, kCsaRatio, T>;
  const Compressor compressor = with_constants<W, kCsaRatio>(part.compressor);
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const Projections& in = compressor.projections;
  const int channel = threads.channel(), lane = threads.thread % kWarp;
  const auto landed = [&](int place) { return Rows{landing + place % kAhead * (Rows::kBytes)}; };
  // Whether a window is valid, and where its rows are, is known later: rows of this step can be read at any rate.
  const auto copy = [&](int place, int index) {
    if (index >= kGroupRows - 1 && index < params.window.plan.tokens) {
      landed(place).copy(in, index - (kGroupRows - 1), channel - 4 * lane, lane);
    }
    commit_copies();
  };
  const auto closing = params.window.plan.closing(kCsaRatio) + run.first;
  int64_t angles = static_cast<int64_t>(run.first) * (kRopeDim / 2);
  Finish next = Finish::load<W>(compressor.norm_weight, compressor.cos + angles, compressor.sin + angles, channel);
#pragma unroll
  for (int place = 0; place < kAhead; ++place) copy(place, place < run.count ? closing[place] : -1);
  sync_threads(kLookUpBarrier, kRunThreads);

#pragma unroll 1
  for (int place = 0; place < run.count + run.more; ++place) {
    const ClosingWindow& window = windows[place];
    const auto kind = window.kind;
    const Finish finish = next;
    angles += kRopeDim / 2;
    if (place + 1 < run.count + run.more) {
      next.load_angles<W>(compressor.cos + angles, compressor.sin + angles, channel);
    }
    Partial4 partial;
    float bias[kGroupRows][4];
    Rows::load_bias(in, 0, channel, bias);
    wait_copies<kAhead - 1>();
    if (kind == ClosingWindow::kStep) partial = landed(place).pool(bias, lane);
    __syncwarp();
    copy(place + kAhead, place + kAhead < run.count ? windows[place + kAhead].index : -1);
    if (kind == ClosingWindow::kNone) continue;
    if (kind == ClosingWindow::kTail) {
      const int64_t layer = *params.kind_layer;
      const Token token = window.closing;
      partial = pool_rows<W, kCsaRatio, T>(compressor.tail, in, layer, token, window.index, 0, channel);
      const bool another =
          token.position + kCsaRatio - (2 * kCsaRatio - 1) < token.start && token.position + kCsaRatio < token.next;
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
    prefill_csa_kernel(UpdateParams params, int rows, LastTokens last) {
  extern __shared__ uint4 landings[];
  __shared__ ClosingWindow windows[kLongestRun + 1];
  __shared__ float scratch[2 * RowThreads<kHeadDim>::kWarps];
  const int thread = threadIdx.x;
  const Run run(rows);
  if (thread >= kPoolThreads) {
    look_up_run(params, run, windows, thread % kWarp);
    arrive(kLookUpBarrier, kRunThreads);
    append_last_tokens<RowT, T, kCsaRatio>(params, last, blockIdx.x, gridDim.x, thread % kWarp);
    return;
  }
  char* landing =
      reinterpret_cast<char*>(landings) + thread / kWarp * (kAhead * Landing<kHeadDim, kCsaRatio, T>::kBytes);
  if (thread < kRowThreads) {
    close_run<kHeadDim, T>(params, params.entries, run, windows, landing, {thread, 2, scratch});
  } else {
    close_run<kKeyDim, T>(params, params.keys, run, windows, landing, {thread % kWarp, 0, nullptr});
  }
}

}  // namespace dsv4::cuda
