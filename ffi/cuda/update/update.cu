// All writes of one layer and step: chooses among the kernels of decode and of prefill, which are compiled by element
// types.

#include "cuda/core/launch.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {

// Each in a file by the types of window rows and projections: decode_*.cu and prefill_*.cu.
template <class RowT, class T>
cudaError_t launch_decode(CUstream_st* stream, const UpdateParams& params);
template <class RowT, class T>
cudaError_t launch_prefill(CUstream_st* stream, const UpdateParams& params);

const char* update(CUstream_st* stream, const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  if (plan.tokens == 0 || plan.requests == 0) return nullptr;
  const Tail& tail = params.entries.compressor.tail;
  cudaError_t status = cudaSuccess;
  with_element(params.window.element, [&](auto row_element) {
    with_element(params.entries.compressor.projections.element, [&](auto element) {
      using RowT = decltype(row_element);
      using T = decltype(element);
      status =
          plan.closings_by_token() ? launch_decode<RowT, T>(stream, params) : launch_prefill<RowT, T>(stream, params);
    });
  });
  return launch_error(tail.data == nullptr       ? "update_swa"
                      : tail.geometry.overlaps() ? "update_csa"
                                                 : "update_hca",
                      status);
}

}  // namespace dsv4::cuda
