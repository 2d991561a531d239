// attend: which of the ways to multiply a launch takes.

#include "cuda/attend/hopper.h"
#include "cuda/attend/portable_launch.cuh"
#include "cuda/core/launch.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

template <class... Codecs>
bool is_of(const Pool& pool) {
  bool same = false;
  visit_codec(HeadCodecs{}, pool.codec, [&](auto codec) { same = (std::is_same_v<decltype(codec), Codecs> || ...); });
  return same;
}

}  // namespace

const char* attend(CUstream_st* stream, const AttendParams& params) {
  const auto all_of = [&](auto test) {
    return test(params.window) && (params.entries.data == nullptr || test(params.entries));
  };
  const bool coded = all_of([](const Pool& pool) { return !is_of<Fp32<kHeadDim>>(pool); });
  if (coded && is_hopper()) {
    if (is_of<Bf16<kHeadDim>>(params.window)) return attention::attend_bf16_window(stream, params);
    if (is_of<Fp8<kHeadDim>>(params.window)) return attention::attend_fp8_window(stream, params);
    return attention::attend_fp8_ds_mla_window(stream, params);
  }
  // The portable tensor-core kernel multiplies dequantized rows: only those that bfloat16 holds as they are.
  const bool held_by_bfloat16 =
      coded && all_of([](const Pool& pool) { return is_of<Bf16<kHeadDim>, Fp8DsMla<kHeadDim>>(pool); });
  return launch_error("attend", held_by_bfloat16
                                    ? attention::launch_portable<attention::TensorProducts>(stream, params)
                                    : attention::launch_portable<attention::ExactProducts>(stream, params));
}

}  // namespace dsv4::cuda
