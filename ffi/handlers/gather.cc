// FFI handlers of the gathers: chosen entries by token, all entries and the window by request.

#include "handlers/call.h"

namespace dsv4 {

GatherEntriesParams check_gather_all_entries(Call& call) {
  GatherEntriesParams params{};
  params.ratio = call.ratio();
  params.plan = call.plan();
  const int width = static_cast<int>(call.size("values", 2));
  params.pool = call.pool("pool", entries_per_block(params.ratio), width, call.attribute<std::string_view>("codec"),
                          call.attribute<float>("global_scale"));
  params.table = call.block_table();
  params.rows = call.rows(width, params.plan.requests);
  params.layer = call.layer();
  return params;
}

GatherEntriesParams check_gather_entries(Call& call) {
  GatherEntriesParams params{};
  params.ratio = call.ratio();
  params.plan = call.plan();
  const int width = static_cast<int>(call.size("values", 2));
  params.pool = call.pool("pool", entries_per_block(params.ratio), width, call.attribute<std::string_view>("codec"),
                          call.attribute<float>("global_scale"));
  params.table = call.block_table();
  params.rows = call.rows(width, params.plan.tokens);
  params.indices = call.indices("indices", {params.plan.tokens, params.rows.count});
  params.layer = call.layer();
  return params;
}

GatherWindowParams check_gather_window(Call& call) {
  GatherWindowParams params{};
  params.window = call.window(call.attribute<std::string_view>("codec"), call.attribute<float>("global_scale"));
  params.positions = call.data<const int32_t>("positions");
  params.plan = call.plan();
  params.before = call.attribute<bool>("before");
  params.rows = call.rows(kHeadDim, params.plan.requests);
  call.that(params.rows.count <= params.window.rows, "values", "asks for more rows than the ring holds");
  params.layer = call.layer();
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(gather_entries, gather_entries);
DSV4_HANDLERS(gather_all_entries, gather_entries);
DSV4_HANDLERS(gather_window, gather_window);
