// Rows into and out of pools on the GPU, one warp a row: flush, the gathers, quantize and dequantize.

#include "../common/entries.h"
#include "../common/kernels.h"
#include "launch.cuh"
#include "warp_rows.cuh"

namespace dsv4::cuda {
namespace {

__device__ __forceinline__ int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
}

// Reads a stored row into output row `out`, or writes zeros and marks it invalid where there is none.
template <class Codec, int kAlignment, class T>
__device__ __forceinline__ void read_or_clear(const Rows& rows, int64_t out, const Pool& pool, uint8_t* page,
                                              int page_row, int position, int lane) {
  T* to = static_cast<T*>(rows.values) + out * Codec::kWidth;
  if (page != nullptr) {
    load_row<Codec, kAlignment>(stored_row<Codec>(page, pool.rows, page_row), to, lane, pool.global_scale);
  } else {
    clear_row(to, Codec::kWidth, lane);
  }
  if (lane == 0) {
    rows.positions[out] = page != nullptr ? position : -1;
    rows.valid[out] = page != nullptr;
  }
}

template <class Codec, int kAlignment>
__global__ void flush_kernel(FlushParams params) {
  const int64_t row = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (row >= params.closing) return;
  const Token closing = token_at(params.plan, params.plan.closing(params.ratio)[row], params.table.slots);
  if (!closing.valid) return;
  const EntryPlace place =
      place_of_entry(params.pool, params.table, *params.layer, closing.slot, closing.position / params.ratio);
  if (place.page == nullptr) return;
  WarpRow<Codec::kWidth> entry;
#pragma unroll
  for (int q = 0; q < entry.kQuads; ++q)
    load_four(params.entries + row * Codec::kWidth + channel_of(q, lane), entry.x[q]);
  store_row<Codec, kAlignment>(stored_row<Codec>(place.page, params.pool.rows, place.row), entry, lane,
                               params.pool.global_scale);
}

template <class Codec, int kAlignment, class T>
__global__ void gather_entries_kernel(GatherEntriesParams params) {
  const int64_t out = warp_index();
  if (out >= params.rows.queries * params.rows.count) return;
  const int64_t query = out / params.rows.count;
  const int entry = params.indices == nullptr ? static_cast<int>(out % params.rows.count) : params.indices[out];
  EntryPlace place{nullptr, 0};
  if (entry >= 0 && entry < params.counts[query]) {
    place = place_of_entry(params.pool, params.table, *params.layer, params.slots[query], entry);
  }
  read_or_clear<Codec, kAlignment, T>(params.rows, out, params.pool, place.page, place.row,
                                      place.page != nullptr ? entry * params.ratio : -1, threadIdx.x % kWarp);
}

template <class Codec, int kAlignment, class T>
__global__ void gather_window_kernel(GatherWindowParams params) {
  const int64_t out = warp_index();
  if (out >= params.rows.queries * params.rows.count) return;
  const int64_t query = out / params.rows.count, row = out % params.rows.count;
  const WindowPlace place = place_in_window(params.window, params.positions, *params.layer, params.slots[query],
                                            params.last[query] - (params.rows.count - 1) + row);
  read_or_clear<Codec, kAlignment, T>(params.rows, out, params.window, place.page, place.row, place.position,
                                      threadIdx.x % kWarp);
}

template <class Codec, int kAlignment, class T>
__global__ void quantize_kernel(QuantizeParams params) {
  const int64_t index = warp_index();
  const int lane = threadIdx.x % kWarp;
  const Pool& page = params.page;
  if (index == 0) {
    const int64_t used = page.rows * static_cast<int64_t>(Layout<Codec>::kDataBytes + Layout<Codec>::kScaleBytes);
    for (int64_t i = used + lane; i < page.page_bytes; i += kWarp) page.data[i] = 0;
  }
  if (index >= page.rows) return;
  WarpRow<Codec::kWidth> row;
#pragma unroll
  for (int q = 0; q < row.kQuads; ++q) {
    load_four(static_cast<const T*>(params.rows) + index * Codec::kWidth + channel_of(q, lane), row.x[q]);
  }
  store_row<Codec, kAlignment>(stored_row<Codec>(page.data, page.rows, index), row, lane, page.global_scale);
}

template <class Codec, int kAlignment, class T>
__global__ void dequantize_kernel(QuantizeParams params) {
  const int64_t index = warp_index();
  const Pool& page = params.page;
  if (index >= page.rows) return;
  load_row<Codec, kAlignment>(stored_row<Codec>(page.data, page.rows, index),
                              static_cast<T*>(params.rows) + index * Codec::kWidth, threadIdx.x % kWarp,
                              page.global_scale);
}

constexpr int kThreads = kRowWarps * kWarp;

}  // namespace

const char* flush(CUstream_st* stream, const FlushParams& params) {
  if (params.closing == 0) return nullptr;
  with_codec(params.pool, [&](auto codec, auto alignment) {
    flush_kernel<decltype(codec), decltype(alignment)::value>
        <<<blocks_for(params.closing, kRowWarps), kThreads, 0, stream>>>(params);
  });
  return launch_error();
}

const char* gather_entries(CUstream_st* stream, const GatherEntriesParams& params) {
  const int64_t rows = params.rows.queries * params.rows.count;
  if (rows == 0) return nullptr;
  with_codec(params.pool, [&](auto codec, auto alignment) {
    with_element(params.rows.element, [&](auto element) {
      gather_entries_kernel<decltype(codec), decltype(alignment)::value, decltype(element)>
          <<<blocks_for(rows, kRowWarps), kThreads, 0, stream>>>(params);
    });
  });
  return launch_error();
}

const char* gather_window(CUstream_st* stream, const GatherWindowParams& params) {
  const int64_t rows = params.rows.queries * params.rows.count;
  if (rows == 0) return nullptr;
  with_codec(params.window, [&](auto codec, auto alignment) {
    if constexpr (decltype(codec)::kWidth == kHeadDim) {
      with_element(params.rows.element, [&](auto element) {
        gather_window_kernel<decltype(codec), decltype(alignment)::value, decltype(element)>
            <<<blocks_for(rows, kRowWarps), kThreads, 0, stream>>>(params);
      });
    }
  });
  return launch_error();
}

const char* quantize(CUstream_st* stream, const QuantizeParams& params) {
  if (params.page.rows == 0) return nullptr;
  with_codec(params.page, [&](auto codec, auto alignment) {
    with_element(params.element, [&](auto element) {
      quantize_kernel<decltype(codec), decltype(alignment)::value, decltype(element)>
          <<<blocks_for(params.page.rows, kRowWarps), kThreads, 0, stream>>>(params);
    });
  });
  return launch_error();
}

const char* dequantize(CUstream_st* stream, const QuantizeParams& params) {
  if (params.page.rows == 0) return nullptr;
  with_codec(params.page, [&](auto codec, auto alignment) {
    with_element(params.element, [&](auto element) {
      dequantize_kernel<decltype(codec), decltype(alignment)::value, decltype(element)>
          <<<blocks_for(params.page.rows, kRowWarps), kThreads, 0, stream>>>(params);
    });
  });
  return launch_error();
}

}  // namespace dsv4::cuda
