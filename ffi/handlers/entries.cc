// FFI handlers of the ops that make, store and read rows of pools: compress, flush, the gathers, quantize and
// dequantize.

#include "handlers/check.h"

namespace dsv4 {

using ffi::AnyBuffer;
using Out = ffi::Result<AnyBuffer>;

ffi::ErrorOr<CompressParams> check_compress(AnyBuffer tail, AnyBuffer kv, AnyBuffer gate, AnyBuffer ape,
                                            AnyBuffer norm_weight, AnyBuffer cos, AnyBuffer sin, AnyBuffer plan,
                                            AnyBuffer layer, Out tail_out, Out entries, int64_t tokens,
                                            int64_t requests, int64_t ratio, float eps, bool hadamard) {
  Checker check("compress");
  CompressParams params{};
  const Tail checked = check.tail("tail", tail, *tail_out, ratio);
  params.plan = check.plan(plan, tokens, requests);
  if (check.failed()) return check.error();
  params.compressor = check.compressor(checked, kv, gate, ape, norm_weight, cos, sin, params.plan, eps, hadamard);
  params.closing = closing_capacity(params.plan.tokens, params.plan.requests, checked.geometry.ratio);
  check.floats("entries", *entries, {params.closing, checked.width});
  params.entries = Checker::data<float>(*entries);
  params.layer = check.layer(layer);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<FlushParams> check_flush(AnyBuffer pool, AnyBuffer entries, AnyBuffer block_table, AnyBuffer plan,
                                      AnyBuffer layer, Out pool_out, int64_t tokens, int64_t requests, int64_t ratio,
                                      std::string_view codec, float global_scale) {
  Checker check("flush");
  FlushParams params{};
  check.that(is_ratio(ratio), "ratio", "is that of no kind of layer: " + std::to_string(ratio));
  params.plan = check.plan(plan, tokens, requests);
  if (check.failed()) return check.error();
  params.ratio = static_cast<int>(ratio);
  params.closing = closing_capacity(params.plan.tokens, params.plan.requests, params.ratio);
  const int width = static_cast<int>(Checker::size(entries, 1));
  params.entries = check.floats("entries", entries, {params.closing, width});
  params.pool = check.pool("pool", pool, *pool_out, entries_per_block(params.ratio), width, codec, global_scale);
  params.table = check.block_table(block_table);
  params.layer = check.layer(layer);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<GatherEntriesParams> check_gather(const char* op, AnyBuffer pool, AnyBuffer block_table, AnyBuffer slots,
                                               AnyBuffer counts, AnyBuffer layer, Out pool_out, Out values,
                                               Out positions, Out valid, int64_t ratio, std::string_view codec,
                                               float global_scale) {
  Checker check(op);
  GatherEntriesParams params{};
  check.that(is_ratio(ratio), "ratio", "is that of no kind of layer: " + std::to_string(ratio));
  if (check.failed()) return check.error();
  params.ratio = static_cast<int>(ratio);
  const int width = static_cast<int>(Checker::size(*values, 2));
  const int64_t queries = Checker::size(slots, 0);
  params.pool = check.pool("pool", pool, *pool_out, entries_per_block(params.ratio), width, codec, global_scale);
  params.table = check.block_table(block_table);
  params.slots = check.indices("slots", slots, {queries});
  params.counts = check.indices("counts", counts, {queries});
  params.rows = check.rows(*values, *positions, *valid, width, queries);
  params.layer = check.layer(layer);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<GatherEntriesParams> check_gather_entries(AnyBuffer pool, AnyBuffer block_table, AnyBuffer slots,
                                                       AnyBuffer counts, AnyBuffer indices, AnyBuffer layer,
                                                       Out pool_out, Out values, Out positions, Out valid,
                                                       int64_t ratio, std::string_view codec, float global_scale) {
  auto params = check_gather("gather_entries", pool, block_table, slots, counts, layer, pool_out, values, positions,
                             valid, ratio, codec, global_scale);
  if (params.has_error()) return params;
  Checker check("gather_entries");
  params->indices = check.indices("indices", indices, {params->rows.queries, params->rows.count});
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<GatherEntriesParams> check_gather_all_entries(AnyBuffer pool, AnyBuffer block_table, AnyBuffer slots,
                                                           AnyBuffer counts, AnyBuffer layer, Out pool_out, Out values,
                                                           Out positions, Out valid, int64_t ratio,
                                                           std::string_view codec, float global_scale) {
  return check_gather("gather_all_entries", pool, block_table, slots, counts, layer, pool_out, values, positions, valid,
                      ratio, codec, global_scale);
}

ffi::ErrorOr<GatherWindowParams> check_gather_window(AnyBuffer window, AnyBuffer positions, AnyBuffer slots,
                                                     AnyBuffer last, AnyBuffer layer, Out window_out, Out positions_out,
                                                     Out values, Out row_positions, Out valid, std::string_view codec,
                                                     float global_scale) {
  Checker check("gather_window");
  GatherWindowParams params{};
  const int ring = static_cast<int>(Checker::size(positions, 2));
  const int64_t queries = Checker::size(slots, 0);
  params.window = check.pool("window", window, *window_out, ring, kHeadDim, codec, global_scale);
  check.indices("positions", positions, {params.window.layers, params.window.pages, ring});
  check.in_place("positions", positions, *positions_out);
  params.positions = Checker::data<const int32_t>(positions);
  params.slots = check.indices("slots", slots, {queries});
  params.last = check.indices("last", last, {queries});
  params.rows = check.rows(*values, *row_positions, *valid, kHeadDim, queries);
  check.that(params.rows.count <= ring, "values", "asks for more rows than the ring holds");
  params.layer = check.layer(layer);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<QuantizeParams> check_rows_and_page(const char* op, AnyBuffer rows, AnyBuffer page, std::string_view codec,
                                                 float global_scale) {
  Checker check(op);
  QuantizeParams params{};
  const int count = static_cast<int>(Checker::size(rows, 0)), width = static_cast<int>(Checker::size(rows, 1));
  check.shape("rows", rows, {kAny, kAny});
  params.element = check.floating("rows", rows);
  params.rows = rows.untyped_data();
  params.page = {Checker::data<uint8_t>(page), 1, 1, 0, count, 0, width, global_scale};
  check.page("page", page, 0, codec, params.page);
  if (check.failed()) return check.error();
  return params;
}

ffi::ErrorOr<QuantizeParams> check_quantize(AnyBuffer rows, Out page, std::string_view codec, float global_scale) {
  return check_rows_and_page("quantize", rows, *page, codec, global_scale);
}

ffi::ErrorOr<QuantizeParams> check_dequantize(AnyBuffer page, Out rows, std::string_view codec, float global_scale) {
  return check_rows_and_page("dequantize", *rows, page, codec, global_scale);
}

ffi::ErrorOr<NormalizeParams> check_normalize(AnyBuffer rows, AnyBuffer norm_weight, AnyBuffer cos, AnyBuffer sin,
                                              Out out, float eps) {
  Checker check("normalize");
  NormalizeParams params{};
  params.count = Checker::size(rows, 0);
  check.shape("rows", rows, {kAny, kHeadDim});
  params.element = check.floating("rows", rows);
  params.rows = rows.untyped_data();
  params.norm = {check.floats("norm_weight", norm_weight, {kHeadDim}),
                 check.floats("cos", cos, {params.count, kRopeDim / 2}),
                 check.floats("sin", sin, {params.count, kRopeDim / 2}), eps};
  check.floats("out", *out, {params.count, kHeadDim});
  params.out = Checker::data<float>(*out);
  if (check.failed()) return check.error();
  return params;
}

// Three symbols share a CPU loop and a kernel: a gather of all entries is one without indices.
namespace cpu {
constexpr auto gather_all_entries = gather_entries;
}
namespace cuda {
constexpr auto gather_all_entries = gather_entries;
}

// clang-format off
DSV4_HANDLERS(Compress, compress,
    .Arg<AnyBuffer>()  // tail [layers, slots, 2, rows, width]
    .Arg<AnyBuffer>()  // kv [tokens, columns]
    .Arg<AnyBuffer>()  // gate [tokens, columns]
    .Arg<AnyBuffer>()  // ape [ratio, columns]
    .Arg<AnyBuffer>()  // norm_weight [width]
    .Arg<AnyBuffer>()  // cos [closing, 32]
    .Arg<AnyBuffer>()  // sin [closing, 32]
    .Arg<AnyBuffer>()  // plan
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>()  // tail, in place
    .Ret<AnyBuffer>()  // entries [closing, width]
    .Attr<int64_t>("tokens").Attr<int64_t>("requests").Attr<int64_t>("ratio").Attr<float>("eps").Attr<bool>("hadamard"));

DSV4_HANDLERS(Normalize, normalize,
    .Arg<AnyBuffer>()  // rows [count, 512]
    .Arg<AnyBuffer>()  // norm_weight [512]
    .Arg<AnyBuffer>()  // cos [count, 32]
    .Arg<AnyBuffer>()  // sin [count, 32]
    .Ret<AnyBuffer>()  // rows, finished, float32 [count, 512]
    .Attr<float>("eps"));

DSV4_HANDLERS(Flush, flush,
    .Arg<AnyBuffer>()  // pool [layers, blocks, page]
    .Arg<AnyBuffer>()  // entries [closing, width]
    .Arg<AnyBuffer>()  // block_table [slots, max_blocks]
    .Arg<AnyBuffer>()  // plan
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>()  // pool, in place
    .Attr<int64_t>("tokens").Attr<int64_t>("requests").Attr<int64_t>("ratio")
    .Attr<std::string_view>("codec").Attr<float>("global_scale"));

DSV4_HANDLERS(GatherEntries, gather_entries,
    .Arg<AnyBuffer>()  // pool [layers, blocks, page]
    .Arg<AnyBuffer>()  // block_table [slots, max_blocks]
    .Arg<AnyBuffer>()  // slots [queries]
    .Arg<AnyBuffer>()  // counts [queries]
    .Arg<AnyBuffer>()  // indices [queries, count]
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>()  // pool, in place
    .Ret<AnyBuffer>()  // values [queries, count, width]
    .Ret<AnyBuffer>()  // positions [queries, count]
    .Ret<AnyBuffer>()  // valid [queries, count]
    .Attr<int64_t>("ratio").Attr<std::string_view>("codec").Attr<float>("global_scale"));

DSV4_HANDLERS(GatherAllEntries, gather_all_entries,
    .Arg<AnyBuffer>()  // pool [layers, blocks, page]
    .Arg<AnyBuffer>()  // block_table [slots, max_blocks]
    .Arg<AnyBuffer>()  // slots [queries]
    .Arg<AnyBuffer>()  // counts [queries]
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>()  // pool, in place
    .Ret<AnyBuffer>()  // values [queries, count, width]
    .Ret<AnyBuffer>()  // positions [queries, count]
    .Ret<AnyBuffer>()  // valid [queries, count]
    .Attr<int64_t>("ratio").Attr<std::string_view>("codec").Attr<float>("global_scale"));

DSV4_HANDLERS(GatherWindow, gather_window,
    .Arg<AnyBuffer>()  // window [layers, slots, page]
    .Arg<AnyBuffer>()  // positions [layers, slots, ring]
    .Arg<AnyBuffer>()  // slots [queries]
    .Arg<AnyBuffer>()  // last [queries]
    .Arg<AnyBuffer>()  // layer
    .Ret<AnyBuffer>().Ret<AnyBuffer>()  // window, positions, in place
    .Ret<AnyBuffer>()  // values [queries, count, 512]
    .Ret<AnyBuffer>()  // row positions [queries, count]
    .Ret<AnyBuffer>()  // valid [queries, count]
    .Attr<std::string_view>("codec").Attr<float>("global_scale"));

DSV4_HANDLERS(Quantize, quantize,
    .Arg<AnyBuffer>()  // rows [count, width]
    .Ret<AnyBuffer>()  // page
    .Attr<std::string_view>("codec").Attr<float>("global_scale"));

DSV4_HANDLERS(Dequantize, dequantize,
    .Arg<AnyBuffer>()  // page
    .Ret<AnyBuffer>()  // rows [count, width]
    .Attr<std::string_view>("codec").Attr<float>("global_scale"));
// clang-format on

}  // namespace dsv4
