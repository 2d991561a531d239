// FFI handlers of update_swa, update_csa and update_hca: all writes of one layer and step in one call.

#include "handlers/call.h"

namespace dsv4 {

namespace {

// A compressor with its pool. Its own operands carry a prefix: none for the entries, "key_" for the indexer's keys.
Compression check_compression(Call& call, const Plan& plan, Name pool, int ratio, int width, bool hadamard,
                              const std::string& prefix, const std::string& component) {
  const Tail tail = call.tail(prefix + "tail", ratio);
  call.that(tail.width == width, prefix + "tail", "has the wrong width");
  const float eps = call.attribute<float>("eps");
  return {call.compressor(tail, plan, eps, hadamard, prefix),
          call.pool(pool, entries_per_block(ratio), width, call.attribute<std::string_view>(component + "_codec"),
                    call.attribute<float>(component + "_global_scale"))};
}

}  // namespace

// What every kind of layer has. Raw rows come with a norm weight of 512, finished ones with an empty one.
UpdateParams check_update_swa(Call& call) {
  UpdateParams params{};
  params.window = call.append_window(call.attribute<std::string_view>("window_codec"), 1.0f);
  if (call.size("row_norm_weight", 0) == 0) return params;
  const int tokens = params.window.plan.tokens;
  params.norm = {call.floats("row_norm_weight", {kHeadDim}), call.floats("row_cos", {tokens, kRopeDim / 2}),
                 call.floats("row_sin", {tokens, kRopeDim / 2}), call.attribute<float>("eps")};
  return params;
}

UpdateParams check_update_hca(Call& call) {
  UpdateParams params = check_update_swa(call);
  params.entries = check_compression(call, params.window.plan, "entries", kHcaRatio, kHeadDim, false, "", "entry");
  params.table = call.block_table();
  params.kind_layer = call.layer("kind_layer");
  return params;
}

UpdateParams check_update_csa(Call& call) {
  UpdateParams params = check_update_swa(call);
  params.entries = check_compression(call, params.window.plan, "entries", kCsaRatio, kHeadDim, false, "", "entry");
  params.keys = check_compression(call, params.window.plan, "keys", kCsaRatio, kKeyDim,
                                  call.attribute<bool>("hadamard"), "key_", "key");
  params.table = call.block_table();
  params.kind_layer = call.layer("kind_layer");
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(update_swa, update);
DSV4_HANDLERS(update_hca, update);
DSV4_HANDLERS(update_csa, update);
