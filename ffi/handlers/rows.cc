// FFI handlers of the ops that store rows: flush, quantize and dequantize.

#include "handlers/call.h"

namespace dsv4 {

FlushParams check_flush(Call& call) {
  FlushParams params{};
  params.ratio = call.ratio();
  params.plan = call.plan();
  params.closing = closing_capacity(params.plan.tokens, params.plan.requests, params.ratio);
  const int width = static_cast<int>(call.size("entries", 1));
  params.entries = call.floats("entries", {params.closing, width});
  params.pool = call.pool("pool", entries_per_block(params.ratio), width, call.attribute<std::string_view>("codec"),
                          call.attribute<float>("global_scale"));
  params.table = call.block_table();
  params.layer = call.layer();
  return params;
}

// Rows [count, width] and one page of them.
QuantizeParams check_quantize(Call& call) {
  QuantizeParams params{};
  const int count = static_cast<int>(call.size("rows", 0)), width = static_cast<int>(call.size("rows", 1));
  call.shape("rows", {kAny, kAny});
  params.element = call.floating("rows");
  params.rows = call.data("rows");
  params.page = {call.data<uint8_t>("page"), 1, 1, 0, count, 0, width, call.attribute<float>("global_scale")};
  call.page("page", 0, call.attribute<std::string_view>("codec"), params.page);
  return params;
}

QuantizeParams check_dequantize(Call& call) { return check_quantize(call); }

}  // namespace dsv4

DSV4_HANDLERS(flush, flush);
DSV4_HANDLERS(quantize, quantize);
DSV4_HANDLERS(dequantize, dequantize);
