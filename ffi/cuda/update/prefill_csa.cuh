// Prefill, CSA: a block closes windows, copying the next while it finishes one. Rows that survive are stored by more
// blocks, or where the windows take all that find place at once, by the last warp of these.
//
// Threads of a closing block: 128 (warps 0 to 3) make the entries, 32 (warp 4) the indexer keys, four channels a
// thread; warp 5 looks the windows up, and may store surviving rows then. Threads of another block: a warp stores a
// row. Barriers: one in shared memory, where warp 5 arrives and the others wait, once; kEntryRow among the first 128.
// Copies are waited for by each warp alone. Shared memory: dynamic, a Landing for each of warps 0 to 4 (8.5 KiB, 12.5
// with fp32 projections); the windows looked up; two scratches of a row, used in turn. Registers that the launch bounds
// leave a thread: 96 (three blocks of six warps), 168 where two blocks find place.
#pragma once

#include "cuda/core/mbarrier.cuh"
#include "cuda/update/landing.cuh"
#include "cuda/update/prefill.cuh"

namespace dsv4::cuda {

constexpr int kPoolThreads = kRowThreads + kWarp;
constexpr int kRunThreads = kPoolThreads + kWarp;
constexpr int kRunWarps = kRunThreads / kWarp;
constexpr int kLongestRun = kWarp / 2 - 1;  // one warp looks all up, with what comes behind each

// Blocks that fit on a multiprocessor: three have too little shared memory where projections are fp32, and too few
// registers where rows are.
template <class RowT, class T>
constexpr int kRunBlocks = sizeof(RowT) == 4 || sizeof(T) == 4 ? 2 : 3;

template <class T>
constexpr int kRunBytes = kPoolThreads / kWarp * Landing<kHeadDim, T>::kBytes;

// How the rows of the step's list of closing windows are spread over blocks: one by one, so that what all blocks read
// at a time lies close together. The first block has fewer: a step of one request has there what pools rows of the
// tail, which takes longer.
struct Runs {
  static constexpr int kLess = 2;
  static constexpr int kEven = kLongestRun - kLess - 1;  // rows a block on average, at most, for none to get too many

  int rows;
  int blocks;
  int first;   // rows of the first block
  int more;    // that each of the others has besides
  int longer;  // how many of the others, the first of them, have one more

  Runs(int rows, int blocks)
      : rows(rows), blocks(blocks), first(blocks == 1 ? rows : std::max(rows / blocks - kLess, 1)) {
    const int left = rows - first * blocks, others = std::max(blocks - 1, 1);
    more = left / others, longer = left % others;
  }

  __device__ __forceinline__ int count(int block) const {
    return block == 0 ? first : first + more + (block <= longer);
  }
  __device__ __forceinline__ int row(int block, int place) const {
    return place < first ? place * blocks + block : first * blocks + (place - first) * (blocks - 1) + block - 1;
  }
};

// The windows that a block closes, looked up. Those that pool rows of a request's tail, two at most, are closed by one
// block, which then moves the tail on: the second is left out of the run that it belongs to, and comes behind the run
// of the first.
struct RunWindows {
  ClosingWindow windows[2 * kLongestRun];
  int rows[2 * kLongestRun + 1];  // of the list
  int count;

  // One warp calls this: a lane for each window of the run, another for the one behind it in the list.
  __device__ __forceinline__ void find(const UpdateParams& params, const Runs& runs, int lane) {
    constexpr int kHalf = kWarp / 2;
    const int place = lane % kHalf, own = runs.count(blockIdx.x);
    const int row = runs.row(blockIdx.x, place) + lane / kHalf;
    ClosingWindow window{};
    if (place < own && row < runs.rows) window = look_up<kCsaRatio>(params, row);
    const Token& closing = window.closing;
    const bool tail = window.kind == ClosingWindow::kTail, second = closing.position - kCsaRatio >= closing.start;
    const unsigned firsts = __ballot_sync(kAllLanes, lane < kHalf && tail && !second) << kHalf;
    const unsigned behind = __ballot_sync(kAllLanes, tail && second) & firsts;
    if (lane < kHalf && tail && second) window.kind = ClosingWindow::kNone;
    const bool is_behind = (behind >> lane & 1) != 0;
    const int to = is_behind ? own + __popc(behind & ((1u << lane) - 1)) : lane;
    if (is_behind || lane < own) windows[to] = window, rows[to] = row;
    if (lane == 0) count = own + __popc(behind);
  }
};

template <int W, class T, bool kDeep>
__device__ __forceinline__ void close_run(const UpdateParams& params, const Compression& part, const Runs& runs,
                                          const RunWindows& run, uint32_t looked_up, char* landing,
                                          const RowThreads<W>& threads) {
  const Compressor compressor = with_constants<W, kCsaRatio, kDeep>(part.compressor);
  const Pool pool = with_rows<kBlockTokens / kCsaRatio>(part.pool);
  const Projections& in = compressor.projections;
  const Plan& plan = params.window.plan;
  const int channel = threads.channel(), lane = threads.thread % kWarp;
  const Landing<W, T> landed{landing, channel - channel_of(0, lane), lane};
  const int of_lane = runs.row(blockIdx.x, lane);
  // Whether a window is valid, and where its rows are, is known later: rows of this step can be read at any rate.
  const int closing = lane < runs.count(blockIdx.x) ? load_early(plan.closing(kCsaRatio) + of_lane) : -1;
  const auto copy = [&](int place) {
    const int index = __shfl_sync(kAllLanes, closing, place);
    if (index >= kGroupRows - 1 && index < plan.tokens) landed.copy(in, index - (kGroupRows - 1));
    commit_copies();
  };
  Finish finish;
  landed.copy_constants(in, compressor.norm_weight);
  copy(0);

  int row = blockIdx.x;  // of the list, that of the window at hand
  float* scratch = threads.scratch;
#pragma unroll 1
  for (int place = 0; place == 0 || place < run.count; ++place) {
    const ClosingWindow& window = run.windows[place];
    const int64_t angles = static_cast<int64_t>(row) * (kRopeDim / 2);
    finish.load_angles<W>(compressor.cos + angles, compressor.sin + angles, channel);
    wait_copies();
    Partials<4> partial;
    if (place == 0 || window.kind == ClosingWindow::kStep) partial = landed.pool();
    __syncwarp();
    copy(place + 1);
    if (place == 0) wait(looked_up, 0);
    row = run.rows[place + 1];
    if (window.kind == ClosingWindow::kNone) continue;
    if (window.kind == ClosingWindow::kTail) {
      const int64_t layer = *params.kind_layer;
      const Token token = window.closing;
      partial = pool_rows<W, kCsaRatio, T, 4>(compressor.tail, in, layer, token, window.index, 0, channel);
      Token later = token;
      later.position += kCsaRatio;
      const bool another = !all_in_step<kCsaRatio>(later) && later.position < later.next;
      if (!another && token.start > 0) {
        move_tail_on<T, 1, 2, 4>(compressor.tail, in, layer, token, window.index, 0, channel);
      }
    }
    const RowThreads<W> now{threads.thread, threads.barrier, scratch};
    // Others may still read this one when the next window's values come.
    scratch = scratch == threads.scratch ? scratch + 2 * now.kWarps : threads.scratch;
    float x[4];
    landed.load_weights(finish.weight);
    finish_csa_entry(compressor, finish, partial, now, x);
    store_entry(pool, {W == kHeadDim ? window.entry_page : window.key_page, window.row}, x, now);
  }
}

template <class RowT, class T, bool kInPassing, bool kDeep>
__global__ void __launch_bounds__(kRunThreads, kRunBlocks<RowT, T>)
    prefill_csa_kernel(const __grid_constant__ UpdateParams params, Runs runs, LastTokens last) {
  extern __shared__ __align__(128) uint4 landings[];  // copies to other addresses take longer
  __shared__ RunWindows run;
  __shared__ float scratch[2 * 2 * RowThreads<kHeadDim>::kWarps];
  const int thread = threadIdx.x;
  if (!kInPassing && static_cast<int>(blockIdx.x) >= runs.blocks) {
    const int other = blockIdx.x - runs.blocks, others = gridDim.x - runs.blocks;
    append_last_tokens<RowT, T, kCsaRatio, kDeep>(params, last, other * kRunWarps + thread / kWarp, others * kRunWarps,
                                                  thread % kWarp);
    return;
  }
  __shared__ __align__(8) uint64_t barrier;
  const uint32_t looked_up = shared_address(&barrier);
  if (thread == 0) init_barrier(looked_up, kWarp);
  __syncthreads();
  if (thread >= kPoolThreads) {
    run.find(params, runs, thread % kWarp);
    arrive(looked_up);
    if (kInPassing) append_last_tokens<RowT, T, kCsaRatio, kDeep>(params, last, blockIdx.x, gridDim.x, thread % kWarp);
    return;
  }
  char* landing = reinterpret_cast<char*>(landings) + thread / kWarp * Landing<kHeadDim, T>::kBytes;
  if (thread < kRowThreads) {
    close_run<kHeadDim, T, kDeep>(params, params.entries, runs, run, looked_up, landing,
                                  {thread, Barrier::kEntryRow, scratch});
  } else {
    close_run<kKeyDim, T, kDeep>(params, params.keys, runs, run, looked_up, landing,
                                 {thread % kWarp, Barrier::kNone, nullptr});
  }
}

}  // namespace dsv4::cuda
