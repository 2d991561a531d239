// FFI handler of index_topk.

#include "handlers/call.h"

namespace dsv4 {

IndexTopkParams check_index_topk(Call& call) {
  IndexTopkParams params{};
  params.ratio = call.ratio();
  params.plan = call.plan();
  params.pool = call.pool("pool", entries_per_block(params.ratio), kKeyDim, call.attribute<std::string_view>("codec"),
                          call.attribute<float>("global_scale"));
  params.table = call.block_table();
  params.layer = call.layer();
  params.hadamard = call.attribute<bool>("hadamard");
  const int64_t tokens = params.plan.tokens, heads = call.size("queries", 1), k = call.size("indices", 1);
  call.shape("queries", {tokens, heads, kKeyDim});
  params.queries = call.data("queries");
  params.element = call.floating("queries");
  params.head_weights = call.floats("head_weights", {tokens, heads});
  params.heads = static_cast<int>(heads);
  params.k = static_cast<int>(k);
  params.indices = call.indices("indices", {tokens, k});
  const bool scores = call.size("scores", 1) > 0;
  float* const chosen = call.floats("scores", {tokens, scores ? k : 0});
  params.scores = scores ? chosen : nullptr;
  params.slab = call.size("every_score", 0), params.capacity = call.size("every_score", 1);
  params.every_score = call.floats("every_score", {kAny, kAny});
  call.that((params.slab > 0 || tokens == 0) && params.capacity % 128 == 0 &&
                params.capacity >= int64_t{params.table.max_blocks} * params.pool.rows,
            "every_score", "must have a place for one token at least, and for all entries rounded up to 128");
  call.type("prepared", ffi::U8);
  const bool prepared = call.size("prepared", 0) > 0;
  call.shape("prepared", {prepared ? params.slab : 0, kPreparedBytes});
  params.prepared = prepared ? call.data<uint8_t>("prepared") : nullptr;
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(index_topk, index_topk);
