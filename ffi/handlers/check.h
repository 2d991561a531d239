// Checks operands of an FFI call and turns them into parameters. The first mistake becomes the call's error, which
// names the op, the operand, what came and what was expected.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

#include "cpu/denormals.h"
#include "layout/codecs.h"
#include "ops/kernels.h"
#include "ops/params.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {

namespace ffi = xla::ffi;

constexpr int64_t kAny = -1;

class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  bool failed() const { return !message_.empty(); }
  ffi::Unexpected<ffi::Error> error() const {
    return ffi::Unexpected<ffi::Error>(ffi::Error(ffi::ErrorCode::kInvalidArgument, message_));
  }

  void that(bool condition, const char* operand, const std::string& problem) {
    if (!condition && message_.empty()) message_ = std::string("dsv4 ") + op_ + ": " + operand + ' ' + problem;
  }

  // The number of elements along `axis`, or 0 where there is no such axis.
  static int64_t size(const ffi::AnyBuffer& buffer, size_t axis) {
    return axis < buffer.dimensions().size() ? buffer.dimensions()[axis] : 0;
  }

  void shape(const char* operand, const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> expected) {
    const auto dimensions = buffer.dimensions();
    bool same = dimensions.size() == expected.size();
    size_t axis = 0;
    for (const int64_t want : expected) {
      same = same && (want == kAny || dimensions[axis] == want);
      ++axis;
    }
    that(same, operand, "has shape " + text(dimensions) + ", expected " + text(expected) + " (* is any size)");
  }

  void type(const char* operand, const ffi::AnyBuffer& buffer, ffi::DataType expected) {
    that(buffer.element_type() == expected, operand, "has the wrong element type for this op");
  }

  Element floating(const char* operand, const ffi::AnyBuffer& buffer) {
    const auto type = buffer.element_type();
    that(type == ffi::F32 || type == ffi::BF16, operand, "must be float32 or bfloat16");
    return type == ffi::BF16 ? Element::kBFloat16 : Element::kFloat32;
  }

  // An operand that the call updates in place: input and output must be one buffer.
  void in_place(const char* operand, const ffi::AnyBuffer& input, const ffi::AnyBuffer& output) {
    that(input.untyped_data() == output.untyped_data(), operand,
         "is updated in place, so its input and output must be aliased (input_output_aliases)");
  }

  Plan plan(const ffi::AnyBuffer& packed, int64_t tokens, int64_t requests) {
    Plan plan{data<const int32_t>(packed), static_cast<int>(tokens), static_cast<int>(requests)};
    type("plan", packed, ffi::S32);
    that(tokens >= 0 && requests >= 0, "plan", "has negative tokens or requests");
    if (!failed()) shape("plan", packed, {plan.size()});
    return plan;
  }

  const int32_t* layer(const ffi::AnyBuffer& layer) {
    type("layer", layer, ffi::S32);
    that(layer.element_count() == 1, "layer", "must be one int32");
    return data<const int32_t>(layer);
  }

  const int32_t* indices(const char* operand, const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> expected) {
    type(operand, buffer, ffi::S32);
    shape(operand, buffer, expected);
    return data<const int32_t>(buffer);
  }

  const float* floats(const char* operand, const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> expected) {
    type(operand, buffer, ffi::F32);
    shape(operand, buffer, expected);
    return data<const float>(buffer);
  }

  // A pool [layers, pages, rows, width] or, quantized, [layers, pages, page_bytes], with `rows` rows to a page.
  Pool pool(const char* operand, const ffi::AnyBuffer& input, const ffi::AnyBuffer& output, int rows, int width,
            std::string_view codec, float global_scale) {
    in_place(operand, input, output);
    Pool pool{data<uint8_t>(input), size(input, 0), size(input, 1), 0, rows, 0, width, global_scale};
    page(operand, input, 2, codec, pool);
    return pool;
  }

  // The axes from `first` on are one page; completes the pool.
  void page(const char* operand, const ffi::AnyBuffer& buffer, size_t first, std::string_view codec, Pool& pool) {
    pool.codec = find_codec(codec.data(), codec.size(), pool.width);
    that(pool.codec >= 0, operand,
         "cannot be stored: no codec " + std::string(codec) + " for width " + std::to_string(pool.width));
    if (pool.codec < 0) return;
    visit_codec(pool.width, pool.codec,
                [&](auto found) { pool.page_bytes = Layout<decltype(found)>::page_bytes(pool.rows); });
    const bool plain = codec == "fp32" || codec == "bf16";
    type(operand, buffer, codec == "fp32" ? ffi::F32 : codec == "bf16" ? ffi::BF16 : ffi::U8);
    const auto dimensions = buffer.dimensions();
    const bool fits =
        plain ? dimensions.size() == first + 2 && dimensions[first] == pool.rows && dimensions[first + 1] == pool.width
              : dimensions.size() == first + 1 && dimensions[first] == pool.page_bytes;
    that(fits, operand,
         "has shape " + text(dimensions) + "; a page of " + std::to_string(pool.rows) + " rows of " +
             std::to_string(pool.width) + " in " + std::string(codec) + " has " + std::to_string(pool.page_bytes) +
             " bytes");
  }

  Tail tail(const char* operand, const ffi::AnyBuffer& input, const ffi::AnyBuffer& output, int64_t ratio) {
    that(is_ratio(ratio), operand, "has a ratio that no kind of layer has: " + std::to_string(ratio));
    if (failed()) return {};
    TailGeometry geometry{static_cast<int>(ratio)};
    const bool running = ratio == kHcaRatio && input.dimensions().size() == 4;
    const int64_t width = size(input, running ? 3 : 4);
    that(width == kHeadDim || width == kKeyDim, operand, "has a width other than 512 and 128");
    if (running) {
      floats(operand, input, {kAny, kAny, 3, kHeadDim});
    } else {
      floats(operand, input, {kAny, kAny, 2, kAny, kAny});
      const int depth = tail_depth(geometry.ratio, size(input, 3));
      that(depth >= 0, operand,
           "has " + std::to_string(size(input, 3)) + " rows, which no depth gives: a tail of ratio " +
               std::to_string(ratio) + " has " + std::to_string(geometry.rows()) + " and, for every " +
               (geometry.overlaps() ? std::to_string(ratio) + " tokens of depth, " + std::to_string(2 * ratio) + " more"
                                    : "token of depth, 1 more"));
      geometry.depth = depth;
    }
    in_place(operand, input, output);
    return {data<float>(input),      size(input, 0), static_cast<int>(size(input, 1)),
            static_cast<int>(width), geometry,       running};
  }

  Projections projections(const ffi::AnyBuffer& kv, const ffi::AnyBuffer& gate, const ffi::AnyBuffer& ape,
                          const Tail& tail, int64_t tokens) {
    const int64_t columns = tail.geometry.overlaps() ? 2 * tail.width : tail.width;
    shape("kv", kv, {tokens, columns});
    shape("gate", gate, {tokens, columns});
    const Element element = floating("kv", kv);
    that(kv.element_type() == gate.element_type(), "gate", "must have the element type of kv");
    return {kv.untyped_data(), gate.untyped_data(), element, floats("ape", ape, {tail.geometry.ratio, columns}),
            static_cast<int>(columns)};
  }

  // The window of a step: its ring, the rows that go there, and the plan.
  AppendWindowParams append_window(const ffi::AnyBuffer& window, const ffi::AnyBuffer& positions,
                                   const ffi::AnyBuffer& rows, const ffi::AnyBuffer& packed,
                                   const ffi::AnyBuffer& layer_index, const ffi::AnyBuffer& window_out,
                                   const ffi::AnyBuffer& positions_out, int64_t tokens, int64_t requests,
                                   std::string_view codec, float global_scale) {
    AppendWindowParams params{};
    const int ring = static_cast<int>(size(positions, 2));
    params.window = pool("window", window, window_out, ring, kHeadDim, codec, global_scale);
    indices("positions", positions, {params.window.layers, params.window.pages, ring});
    in_place("positions", positions, positions_out);
    params.positions = data<int32_t>(positions);
    shape("rows", rows, {tokens, kHeadDim});
    params.element = floating("rows", rows);
    params.rows = rows.untyped_data();
    params.plan = plan(packed, tokens, requests);
    params.layer = layer(layer_index);
    return params;
  }

  // How a compressor with this tail finishes its entries; `closing` of them.
  Compressor compressor(const Tail& tail, const ffi::AnyBuffer& kv, const ffi::AnyBuffer& gate,
                        const ffi::AnyBuffer& ape, const ffi::AnyBuffer& norm_weight, const ffi::AnyBuffer& cos,
                        const ffi::AnyBuffer& sin, const Plan& plan, float eps, bool hadamard) {
    const int closing = closing_capacity(plan.tokens, plan.requests, tail.geometry.ratio);
    that(!hadamard || tail.width == kKeyDim, "hadamard", "is for rows of width 128 only");
    return {tail,
            projections(kv, gate, ape, tail, plan.tokens),
            floats("norm_weight", norm_weight, {tail.width}),
            floats("cos", cos, {closing, kRopeDim / 2}),
            floats("sin", sin, {closing, kRopeDim / 2}),
            eps,
            hadamard};
  }

  BlockTable block_table(const ffi::AnyBuffer& table) {
    indices("block_table", table, {kAny, kAny});
    return {data<const int32_t>(table), static_cast<int>(size(table, 0)), static_cast<int>(size(table, 1))};
  }

  Rows rows(const ffi::AnyBuffer& values, const ffi::AnyBuffer& positions, const ffi::AnyBuffer& valid, int width,
            int64_t queries) {
    shape("values", values, {queries, kAny, width});
    const int64_t count = size(values, 1);
    indices("positions", positions, {queries, count});
    shape("valid", valid, {queries, count});
    type("valid", valid, ffi::PRED);
    return {
        values.untyped_data(), floating("values", values), data<int32_t>(positions), data<bool>(valid), queries, count};
  }

  template <class T>
  static T* data(const ffi::AnyBuffer& buffer) {
    return static_cast<T*>(buffer.untyped_data());
  }

 private:
  template <class Sizes>
  static std::string text(const Sizes& sizes) {
    std::string out = "[";
    for (const int64_t size : sizes) out += (out.size() > 1 ? ", " : "") + (size == kAny ? "*" : std::to_string(size));
    return out + "]";
  }

  const char* op_;
  std::string message_;
};

// Checks the operands with `kCheck`, then runs on the host, or launches on the stream.
template <auto kCheck, auto kRun>
struct CpuHandler {
  template <class... Operands>
  ffi::Error operator()(Operands... operands) const {
    auto params = kCheck(operands...);
    if (params.has_error()) return params.error();
    const KeepDenormals guard;
    kRun(*params);
    return ffi::Error::Success();
  }
};

template <auto kCheck, auto kLaunch>
struct CudaHandler {
  template <class... Operands>
  ffi::Error operator()(CUstream_st* stream, Operands... operands) const {
    auto params = kCheck(operands...);
    if (params.has_error()) return params.error();
    const char* problem = kLaunch(stream, *params);
    return problem == nullptr ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInternal, problem);
  }
};

}  // namespace dsv4

// Defines the symbols Dsv4<Name>Cpu and, in a CUDA build, Dsv4<Name>Cuda: one check, one binding, two ways to run.
#define DSV4_CPU_HANDLER(Name, name, BINDING)                                                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4##Name##Cpu, (dsv4::CpuHandler<dsv4::check_##name, dsv4::cpu::name>{}), \
                                xla::ffi::Ffi::Bind() BINDING, {xla::ffi::Traits::kCmdBufferCompatible})
#ifdef DSV4_WITH_CUDA
#define DSV4_CUDA_HANDLER(Name, name, BINDING, ...)                                                            \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4##Name##Cuda, (dsv4::CudaHandler<dsv4::check_##name, dsv4::cuda::name>{}), \
                                xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<CUstream_st*>>() BINDING,   \
                                {__VA_ARGS__})
#else
#define DSV4_CUDA_HANDLER(Name, name, BINDING, ...)
#endif
#define DSV4_HANDLERS(Name, name, BINDING) \
  DSV4_CPU_HANDLER(Name, name, BINDING);   \
  DSV4_CUDA_HANDLER(Name, name, BINDING, xla::ffi::Traits::kCmdBufferCompatible)
// Launched by itself, in front of the CUDA graph or between two. XLA updates a whole graph when the address of an
// argument that it reads has changed; what reads an argument that is new in every step must therefore lie outside.
#define DSV4_HANDLERS_OUTSIDE_GRAPHS(Name, name, BINDING) \
  DSV4_CPU_HANDLER(Name, name, BINDING);                  \
  DSV4_CUDA_HANDLER(Name, name, BINDING)
