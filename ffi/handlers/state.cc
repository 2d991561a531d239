// FFI handlers of the ops that write per-request state: begin_step, append_window, append_tail, rotate.

#include "handlers/check.h"

namespace dsv4 {

using ffi::AnyBuffer;
using Out = ffi::Result<AnyBuffer>;

ffi::ErrorOr<BeginStepParams> check_begin_step(AnyBuffer block_table, AnyBuffer window_positions, AnyBuffer plan,
                                               Out block_table_out, Out window_positions_out, Out plan_copy,
                                               int64_t tokens, int64_t requests) {
  Checker check("begin_step");
  BeginStepParams params{};
  params.slots = static_cast<int>(Checker::size(block_table, 0));
  params.max_blocks = static_cast<int>(Checker::size(block_table, 1));
  check.indices("block_table", block_table, {kAny, kAny});
  check.in_place("block_table", block_table, *block_table_out);
  check.indices("window_positions", window_positions, {kAny, params.slots, kAny});
  check.in_place("window_positions", window_positions, *window_positions_out);
  params.block_table = Checker::data<int32_t>(block_table);
  params.window_positions = Checker::data<int32_t>(window_positions);
  params.window_layers = Checker::size(window_positions, 0);
  params.ring = static_cast<int>(Checker::size(window_positions, 2));
  params.plan = check.plan(plan, tokens, requests);
  check.indices("the plan's copy", *plan_copy, {params.plan.size()});
  params.plan_copy = Checker::data<int32_t>(*plan_copy);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<AppendWindowParams> check_append_window(AnyBuffer window, AnyBuffer positions, AnyBuffer rows,
                                                     AnyBuffer plan, AnyBuffer layer, Out window_out, Out positions_out,
                                                     int64_t tokens, int64_t requests, std::string_view codec,
                                                     float global_scale) {
  Checker check("append_window");
  const AppendWindowParams params = check.append_window(window, positions, rows, plan, layer, *window_out,
                                                        *positions_out, tokens, requests, codec, global_scale);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<AppendTailParams> check_append_tail(AnyBuffer tail, AnyBuffer kv, AnyBuffer gate, AnyBuffer ape,
                                                 AnyBuffer plan, AnyBuffer layer, Out tail_out, int64_t tokens,
                                                 int64_t requests, int64_t ratio) {
  Checker check("append_tail");
  AppendTailParams params{};
  params.tail = check.tail("tail", tail, *tail_out, ratio);
  params.projections = check.projections(kv, gate, ape, params.tail, tokens);
  params.plan = check.plan(plan, tokens, requests);
  params.layer = check.layer(layer);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<RotateParams> check_rotate(AnyBuffer tail, AnyBuffer plan, AnyBuffer layer, Out tail_out, int64_t tokens,
                                        int64_t requests, int64_t ratio) {
  Checker check("rotate");
  RotateParams params{};
  params.tail = check.tail("tail", tail, *tail_out, ratio);
  params.plan = check.plan(plan, tokens, requests);
  params.layer = check.layer(layer);
  if (check.failed()) return check.error();
  return params;
}

// clang-format off
// The only op that reads a step's plan where the host put it.
DSV4_HANDLERS_OUTSIDE_GRAPHS(BeginStep, begin_step,
    .Arg<AnyBuffer>()  // block_table [slots, max_blocks]
    .Arg<AnyBuffer>()  // window_positions [layers, slots, ring]
    .Arg<AnyBuffer>()  // plan
    .Ret<AnyBuffer>().Ret<AnyBuffer>()  // block_table, window_positions, in place
    .Ret<AnyBuffer>()  // plan, copied
    .Attr<int64_t>("tokens").Attr<int64_t>("requests"));

DSV4_HANDLERS(AppendWindow, append_window,
    .Arg<AnyBuffer>()  // window [layers, slots, page]
    .Arg<AnyBuffer>()  // positions [layers, slots, ring]
    .Arg<AnyBuffer>()  // rows [tokens, 512]
    .Arg<AnyBuffer>()  // plan
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>().Ret<AnyBuffer>()  // window, positions, in place
    .Attr<int64_t>("tokens").Attr<int64_t>("requests").Attr<std::string_view>("codec").Attr<float>("global_scale"));

DSV4_HANDLERS(AppendTail, append_tail,
    .Arg<AnyBuffer>()  // tail [layers, slots, 2, rows, width]
    .Arg<AnyBuffer>()  // kv [tokens, columns]
    .Arg<AnyBuffer>()  // gate [tokens, columns]
    .Arg<AnyBuffer>()  // ape [ratio, columns]
    .Arg<AnyBuffer>()  // plan
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>()  // tail, in place
    .Attr<int64_t>("tokens").Attr<int64_t>("requests").Attr<int64_t>("ratio"));

DSV4_HANDLERS(Rotate, rotate,
    .Arg<AnyBuffer>()  // tail [layers, slots, 2, rows, width]
    .Arg<AnyBuffer>()  // plan
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>()  // tail, in place
    .Attr<int64_t>("tokens").Attr<int64_t>("requests").Attr<int64_t>("ratio"));
// clang-format on

}  // namespace dsv4
