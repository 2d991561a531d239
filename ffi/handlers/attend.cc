// FFI handlers of attention: over the window alone, with chosen entries, and with all of them.

#include "handlers/call.h"

namespace dsv4 {
namespace {

// The window, its displaced rows and what is asked of them: all but entries.
AttendParams check_window_and_queries(Call& call) {
  AttendParams params{};
  params.plan = call.plan();
  const int tokens = params.plan.tokens;
  const auto codec = call.attribute<std::string_view>("window_codec");
  params.window = call.window(codec, 1.0f);
  params.window_positions = call.data<const int32_t>("positions");
  params.window_layer = call.layer();
  params.window_size = static_cast<int>(call.attribute<int64_t>("size"));
  call.that(params.window_size > 0 && params.window_size <= params.window.rows, "size",
            "is not that of a window which the ring holds");

  const int64_t displaced = call.size("displaced_positions", 0);
  params.displaced_positions = call.indices("displaced_positions", {displaced});
  if (displaced > 0) {
    call.shape("displaced_positions", {displaced_rows(params.plan, params.window_size)});
    params.displaced = call.pool("displaced", static_cast<int>(displaced), kHeadDim, codec, 1.0f);
    call.that(params.displaced.layers == 1 && params.displaced.pages == 1, "displaced", "must be one page");
  }

  params.heads = static_cast<int>(call.size("queries", 1));
  call.shape("queries", {tokens, params.heads, kHeadDim});
  params.query_element = call.floating("queries");
  params.queries = call.data<const void>("queries");
  if (call.size("sinks", 0) > 0) params.sinks = call.floats("sinks", {params.heads});
  if (call.size("cos", 0) > 0) {
    params.cos = call.floats("cos", {tokens, kRopeDim / 2});
    params.sin = call.floats("sin", {tokens, kRopeDim / 2});
  }
  params.scale = call.attribute<float>("scale");

  call.shape("output", {tokens, params.heads, kHeadDim});
  params.output = call.data("output");
  params.output_element = call.floating("output");
  params.lse = call.floats("lse", {tokens, params.heads});
  const int64_t blocks = call.size("block_sums", 1);
  call.that(blocks == 1 || blocks == 2 || blocks == 4 || blocks == 8 || blocks == 16, "block_sums",
            "is not of 1, 2, 4, 8 or 16 blocks");
  params.blocks = static_cast<int>(blocks);
  const int64_t heads = call.size("block_sums", 2);
  call.that(heads == 16 || heads == 32 || heads == kAttendedHeads, "block_sums", "is not of 16, 32 or 64 heads");
  params.block_heads = static_cast<int>(heads);
  const int64_t parts = call.size("part_rows", 0);
  params.part_rows = call.floats("part_rows", {parts, tokens, params.heads, kHeadDim});
  params.part_shares = call.floats("part_shares", {parts, tokens, params.heads, 2});
  params.parts = parts > 1 ? static_cast<int>(parts) : 1;
  const int64_t clusters = params.parts * tokens * ((params.heads + heads - 1) / heads);
  params.block_sums = call.floats("block_sums", {blocks > 2 ? clusters : 0, blocks, heads, kHeadDim});
  return params;
}

void check_entries(Call& call, AttendParams& params) {
  params.ratio = call.ratio();
  params.entries =
      call.pool("entries", entries_per_block(params.ratio), kHeadDim, call.attribute<std::string_view>("entry_codec"),
                call.attribute<float>("entry_global_scale"));
  params.table = call.block_table();
  params.entries_layer = call.layer("kind_layer");
}

}  // namespace

AttendParams check_attend_window(Call& call) { return check_window_and_queries(call); }

AttendParams check_attend_entries(Call& call) {
  AttendParams params = check_window_and_queries(call);
  check_entries(call, params);
  params.count = static_cast<int>(call.size("indices", 1));
  params.indices = call.indices("indices", {params.plan.tokens, params.count});
  return params;
}

AttendParams check_attend_all_entries(Call& call) {
  AttendParams params = check_window_and_queries(call);
  check_entries(call, params);
  params.count = static_cast<int>(call.attribute<int64_t>("count"));
  call.that(params.count >= 0, "count", "is negative");
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(attend_window, attend);
DSV4_HANDLERS(attend_entries, attend);
DSV4_HANDLERS(attend_all_entries, attend);
