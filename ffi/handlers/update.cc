// FFI handlers of update_swa, update_csa and update_hca: all writes of one layer and step in one call.

#include "handlers/check.h"

namespace dsv4 {

using ffi::AnyBuffer;
using Out = ffi::Result<AnyBuffer>;

namespace {

// A compressor's operands other than its tail and pool.
struct CompressorOperands {
  AnyBuffer kv, gate, ape, norm_weight, cos, sin;
};

// The operands that every kind of layer has. Raw rows come with a norm_weight of 512, finished ones with an empty one.
void check_window(Checker& check, UpdateParams& params, const AnyBuffer& window, const AnyBuffer& positions,
                  const AnyBuffer& rows, const AnyBuffer& norm_weight, const AnyBuffer& cos, const AnyBuffer& sin,
                  const AnyBuffer& plan, const AnyBuffer& layer, const AnyBuffer& window_out,
                  const AnyBuffer& positions_out, int64_t tokens, int64_t requests, float eps, std::string_view codec) {
  params.window = check.append_window(window, positions, rows, plan, layer, window_out, positions_out, tokens, requests,
                                      codec, 1.0f);
  if (Checker::size(norm_weight, 0) == 0) return;
  params.norm = {check.floats("row_norm_weight", norm_weight, {kHeadDim}),
                 check.floats("row_cos", cos, {tokens, kRopeDim / 2}),
                 check.floats("row_sin", sin, {tokens, kRopeDim / 2}), eps};
}

Compression check_compression(Checker& check, const UpdateParams& params, const char* tail_name, const AnyBuffer& tail,
                              const AnyBuffer& tail_out, const char* pool_name, const AnyBuffer& pool,
                              const AnyBuffer& pool_out, const CompressorOperands& in, int64_t ratio, int width,
                              std::string_view codec, float global_scale, float eps, bool hadamard) {
  const Tail checked = check.tail(tail_name, tail, tail_out, ratio);
  check.that(checked.width == width, tail_name, "has the wrong width");
  if (check.failed()) return {};
  return {
      check.compressor(checked, in.kv, in.gate, in.ape, in.norm_weight, in.cos, in.sin, params.window.plan, eps,
                       hadamard),
      check.pool(pool_name, pool, pool_out, entries_per_block(static_cast<int>(ratio)), width, codec, global_scale)};
}

}  // namespace

ffi::ErrorOr<UpdateParams> check_update_swa(AnyBuffer window, AnyBuffer positions, AnyBuffer rows,
                                            AnyBuffer row_norm_weight, AnyBuffer row_cos, AnyBuffer row_sin,
                                            AnyBuffer plan, AnyBuffer layer, Out window_out, Out positions_out,
                                            int64_t tokens, int64_t requests, float eps,
                                            std::string_view window_codec) {
  Checker check("update_swa");
  UpdateParams params{};
  check_window(check, params, window, positions, rows, row_norm_weight, row_cos, row_sin, plan, layer, *window_out,
               *positions_out, tokens, requests, eps, window_codec);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<UpdateParams> check_update_hca(AnyBuffer window, AnyBuffer positions, AnyBuffer entries, AnyBuffer tail,
                                            AnyBuffer rows, AnyBuffer row_norm_weight, AnyBuffer row_cos,
                                            AnyBuffer row_sin, AnyBuffer plan, AnyBuffer layer, AnyBuffer kind_layer,
                                            AnyBuffer block_table, AnyBuffer kv, AnyBuffer gate, AnyBuffer ape,
                                            AnyBuffer norm_weight, AnyBuffer cos, AnyBuffer sin, Out window_out,
                                            Out positions_out, Out entries_out, Out tail_out, int64_t tokens,
                                            int64_t requests, float eps, std::string_view window_codec,
                                            std::string_view entry_codec, float global_scale) {
  Checker check("update_hca");
  UpdateParams params{};
  check_window(check, params, window, positions, rows, row_norm_weight, row_cos, row_sin, plan, layer, *window_out,
               *positions_out, tokens, requests, eps, window_codec);
  params.entries = check_compression(check, params, "tail", tail, *tail_out, "entries", entries, *entries_out,
                                     {kv, gate, ape, norm_weight, cos, sin}, kHcaRatio, kHeadDim, entry_codec,
                                     global_scale, eps, false);
  params.table = check.block_table(block_table);
  params.kind_layer = check.layer(kind_layer);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<UpdateParams> check_update_csa(
    AnyBuffer window, AnyBuffer positions, AnyBuffer entries, AnyBuffer tail, AnyBuffer keys, AnyBuffer key_tail,
    AnyBuffer rows, AnyBuffer row_norm_weight, AnyBuffer row_cos, AnyBuffer row_sin, AnyBuffer plan, AnyBuffer layer,
    AnyBuffer kind_layer, AnyBuffer block_table, AnyBuffer kv, AnyBuffer gate, AnyBuffer ape, AnyBuffer norm_weight,
    AnyBuffer cos, AnyBuffer sin, AnyBuffer index_kv, AnyBuffer index_gate, AnyBuffer index_ape,
    AnyBuffer index_norm_weight, AnyBuffer index_cos, AnyBuffer index_sin, Out window_out, Out positions_out,
    Out entries_out, Out tail_out, Out keys_out, Out key_tail_out, int64_t tokens, int64_t requests, float eps,
    std::string_view window_codec, std::string_view entry_codec, std::string_view key_codec, float global_scale,
    bool hadamard) {
  Checker check("update_csa");
  UpdateParams params{};
  check_window(check, params, window, positions, rows, row_norm_weight, row_cos, row_sin, plan, layer, *window_out,
               *positions_out, tokens, requests, eps, window_codec);
  params.entries = check_compression(check, params, "tail", tail, *tail_out, "entries", entries, *entries_out,
                                     {kv, gate, ape, norm_weight, cos, sin}, kCsaRatio, kHeadDim, entry_codec,
                                     global_scale, eps, false);
  params.keys = check_compression(check, params, "key_tail", key_tail, *key_tail_out, "keys", keys, *keys_out,
                                  {index_kv, index_gate, index_ape, index_norm_weight, index_cos, index_sin}, kCsaRatio,
                                  kKeyDim, key_codec, global_scale, eps, hadamard);
  params.table = check.block_table(block_table);
  params.kind_layer = check.layer(kind_layer);
  if (check.failed()) return check.error();
  return params;
}

// Three symbols share a CPU function and a launch.
namespace cpu {
constexpr auto update_swa = update, update_hca = update, update_csa = update;
}
namespace cuda {
constexpr auto update_swa = update, update_hca = update, update_csa = update;
}

// clang-format off
#define DSV4_ROW_ARGS                                                                                             \
    .Arg<AnyBuffer>() /* rows [tokens, 512] */ .Arg<AnyBuffer>() /* row_norm_weight [512], or [0]: finished */    \
    .Arg<AnyBuffer>() /* row_cos [tokens, 32] or [0] */ .Arg<AnyBuffer>() /* row_sin */                           \
    .Arg<AnyBuffer>() /* plan */ .Arg<AnyBuffer>() /* layer */
#define DSV4_COMPRESSOR_ARGS                                                                                      \
    .Arg<AnyBuffer>() /* kv [tokens, columns] */ .Arg<AnyBuffer>() /* gate */ .Arg<AnyBuffer>() /* ape */         \
    .Arg<AnyBuffer>() /* norm_weight [width] */ .Arg<AnyBuffer>() /* cos [closing, 32] */ .Arg<AnyBuffer>() /* sin */
#define DSV4_STEP_ATTRS                                                                                           \
    .Attr<int64_t>("tokens").Attr<int64_t>("requests").Attr<float>("eps").Attr<std::string_view>("window_codec")

DSV4_HANDLERS(UpdateSwa, update_swa,
    .Arg<AnyBuffer>()  // window [layers, slots, page]
    .Arg<AnyBuffer>()  // positions [layers, slots, ring]
    DSV4_ROW_ARGS
    .Ret<AnyBuffer>().Ret<AnyBuffer>()  // window, positions, in place
    DSV4_STEP_ATTRS);

DSV4_HANDLERS(UpdateHca, update_hca,
    .Arg<AnyBuffer>()  // window [layers, slots, page]
    .Arg<AnyBuffer>()  // positions [layers, slots, ring]
    .Arg<AnyBuffer>()  // entries [hca_layers, blocks, page]
    .Arg<AnyBuffer>()  // tail [hca_layers, slots, 2, 128, 512] or [hca_layers, slots, 3, 512]
    DSV4_ROW_ARGS
    .Arg<AnyBuffer>()  // kind_layer
    .Arg<AnyBuffer>()  // block_table [slots, max_blocks]
    DSV4_COMPRESSOR_ARGS
    .Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>()  // the first four, in place
    DSV4_STEP_ATTRS.Attr<std::string_view>("entry_codec").Attr<float>("global_scale"));

DSV4_HANDLERS(UpdateCsa, update_csa,
    .Arg<AnyBuffer>()  // window [layers, slots, page]
    .Arg<AnyBuffer>()  // positions [layers, slots, ring]
    .Arg<AnyBuffer>()  // entries [csa_layers, blocks, page]
    .Arg<AnyBuffer>()  // tail [csa_layers, slots, 2, 12, 512]
    .Arg<AnyBuffer>()  // keys [csa_layers, blocks, page]
    .Arg<AnyBuffer>()  // key_tail [csa_layers, slots, 2, 12, 128]
    DSV4_ROW_ARGS
    .Arg<AnyBuffer>()  // kind_layer
    .Arg<AnyBuffer>()  // block_table [slots, max_blocks]
    DSV4_COMPRESSOR_ARGS
    DSV4_COMPRESSOR_ARGS  // of the indexer
    .Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>()  // the first six
    DSV4_STEP_ATTRS.Attr<std::string_view>("entry_codec").Attr<std::string_view>("key_codec").Attr<float>("global_scale")
    .Attr<bool>("hadamard"));
// clang-format on

}  // namespace dsv4
