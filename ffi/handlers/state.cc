// FFI handlers of the ops that write per-request state: begin_step, append_window, append_tail, rotate.

#include "handlers/call.h"

namespace dsv4 {

BeginStepParams check_begin_step(Call& call) {
  BeginStepParams params{};
  params.slots = static_cast<int>(call.size("block_table", 0));
  params.max_blocks = static_cast<int>(call.size("block_table", 1));
  params.block_table = call.indices("block_table", {kAny, kAny});
  params.write_table = call.indices("write_table", {params.slots, params.max_blocks});
  params.window_positions = call.indices("window_positions", {kAny, params.slots, kAny});
  params.window_layers = call.size("window_positions", 0);
  params.ring = static_cast<int>(call.size("window_positions", 2));
  params.plan = call.plan();
  params.plan_copy = call.indices("plan_copy", {params.plan.size()});
  return params;
}

AppendWindowParams check_append_window(Call& call) {
  return call.append_window(call.attribute<std::string_view>("codec"), call.attribute<float>("global_scale"));
}

AppendTailParams check_append_tail(Call& call) {
  const Tail tail = call.tail("tail", call.ratio());
  const Plan plan = call.plan();
  return {tail, call.projections(tail, plan.tokens), plan, call.layer()};
}

RotateParams check_rotate(Call& call) { return {call.tail("tail", call.ratio()), call.plan(), call.layer()}; }

}  // namespace dsv4

DSV4_HANDLERS(begin_step, begin_step);
DSV4_HANDLERS(append_window, append_window);
DSV4_HANDLERS(append_tail, append_tail);
DSV4_HANDLERS(rotate, rotate);
