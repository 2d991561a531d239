// FFI handlers of the ops that finish rows: compress, of the windows that a step closes, and normalize.

#include "handlers/call.h"

namespace dsv4 {

CompressParams check_compress(Call& call) {
  CompressParams params{};
  const Tail tail = call.tail("tail", call.ratio());
  params.plan = call.plan();
  params.compressor =
      call.compressor(tail, params.plan, call.attribute<float>("eps"), call.attribute<bool>("hadamard"));
  params.closing = closing_capacity(params.plan.tokens, params.plan.requests, tail.geometry.ratio);
  params.entries = call.floats("entries", {params.closing, tail.width});
  params.layer = call.layer();
  return params;
}

NormalizeParams check_normalize(Call& call) {
  NormalizeParams params{};
  params.count = call.size("rows", 0);
  call.shape("rows", {kAny, kHeadDim});
  params.element = call.floating("rows");
  params.rows = call.data("rows");
  params.norm = {call.floats("norm_weight", {kHeadDim}), call.floats("cos", {params.count, kRopeDim / 2}),
                 call.floats("sin", {params.count, kRopeDim / 2}), call.attribute<float>("eps")};
  params.out = call.floats("finished", {params.count, kHeadDim});
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(compress, compress);
DSV4_HANDLERS(normalize, normalize);
