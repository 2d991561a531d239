// Rows into pools and pages on the GPU, one warp a row: flush, quantize and dequantize. Gathers are in gather.cu.

#include "cuda/core/launch.cuh"
#include "cuda/core/warp_rows.cuh"
#include "layout/places.h"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

__device__ __forceinline__ int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
}

template <class Codec>
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
    load_values(params.entries + row * Codec::kWidth + channel_of(q, lane), entry.x[q]);
  store_row<Codec>(stored_row<Codec>(place.page, params.pool.rows, place.row), entry, lane, params.pool.global_scale);
}

template <class Codec, class T>
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
    load_values(static_cast<const T*>(params.rows) + index * Codec::kWidth + channel_of(q, lane), row.x[q]);
  }
  store_row<Codec>(stored_row<Codec>(page.data, page.rows, index), row, lane, page.global_scale);
}

template <class Codec, class T>
__global__ void dequantize_kernel(QuantizeParams params) {
  const int64_t index = warp_index();
  const Pool& page = params.page;
  if (index >= page.rows) return;
  load_row<Codec>(stored_row<Codec>(page.data, page.rows, index), static_cast<T*>(params.rows) + index * Codec::kWidth,
                  threadIdx.x % kWarp, page.global_scale);
}

constexpr int kThreads = kRowWarps * kWarp;

}  // namespace

const char* flush(CUstream_st* stream, const FlushParams& params) {
  if (params.closing == 0) return nullptr;
  visit_codec(params.pool.width, params.pool.codec, [&](auto codec) {
    flush_kernel<decltype(codec)><<<blocks_for(params.closing, kRowWarps), kThreads, 0, stream>>>(params);
  });
  return launch_error("flush");
}

const char* quantize(CUstream_st* stream, const QuantizeParams& params) {
  if (params.page.rows == 0) return nullptr;
  visit_codec(params.page.width, params.page.codec, [&](auto codec) {
    with_element(params.element, [&](auto element) {
      quantize_kernel<decltype(codec), decltype(element)>
          <<<blocks_for(params.page.rows, kRowWarps), kThreads, 0, stream>>>(params);
    });
  });
  return launch_error("quantize");
}

const char* dequantize(CUstream_st* stream, const QuantizeParams& params) {
  if (params.page.rows == 0) return nullptr;
  visit_codec(params.page.width, params.page.codec, [&](auto codec) {
    with_element(params.element, [&](auto element) {
      dequantize_kernel<decltype(codec), decltype(element)>
          <<<blocks_for(params.page.rows, kRowWarps), kThreads, 0, stream>>>(params);
    });
  });
  return launch_error("dequantize");
}

}  // namespace dsv4::cuda
