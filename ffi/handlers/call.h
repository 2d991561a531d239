// One FFI call: its operands, results and attributes by name, checked and turned into parameters. The first mistake
// becomes the call's error, which names the op, the operand, what came and what was expected.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/denormals.h"
#include "handlers/alignment.h"
#include "layout/codecs.h"
#include "ops/signatures.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {

namespace ffi = xla::ffi;

using Name = std::string_view;

constexpr int64_t kAny = -1;

class Call {
 public:
  Call(const Signature& signature, ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes)
      : op_(signature.op), attributes_(attributes) {
    const auto operand = [&](size_t i) { return operands.get<ffi::AnyBuffer>(i); };
    const auto result = [&](size_t i) { return results.get<ffi::AnyBuffer>(i); };
    bind(signature.operands, "operands", operands.size(), operand, operands_);
    bind(signature.results, "results", results.size(), result, results_);
    for (const Bound& out : results_) {
      const Bound* in = find(operands_, out.name);
      that(in == nullptr || in->data() == out.data(), out.name,
           "is updated in place, so its input and output must be aliased (input_output_aliases)");
    }
  }

  // The same call, for kernels that load 16 bytes at once.
  Call aligned() && {
    for (const auto* bound : {&operands_, &results_}) {
      for (const Bound& one : *bound) {
        that(is_aligned(one.buffer), one.name, "does not begin at a multiple of 16 bytes, as CUDA kernels need it");
      }
    }
    return std::move(*this);
  }

  bool failed() const { return !message_.empty(); }
  ffi::Error error() const { return ffi::Error(ffi::ErrorCode::kInvalidArgument, message_); }

  void that(bool condition, Name operand, const std::string& problem) {
    if (!condition && message_.empty()) {
      message_ = "dsv4 " + std::string(op_) + ": " + std::string(operand) + ' ' + problem;
    }
  }

  // The number of elements along `axis` of an operand or result, or 0 where there is no such axis.
  int64_t size(Name name, size_t axis) const {
    const auto dimensions = at(name).dimensions();
    return axis < dimensions.size() ? dimensions[axis] : 0;
  }

  int64_t bytes(Name name) const { return static_cast<int64_t>(at(name).size_bytes()); }

  size_t rank(Name name) const { return at(name).dimensions().size(); }

  template <class T>
  T attribute(Name name) {
    const auto value = attributes_.get<T>(name);
    that(value.has_value(), name, "is missing among the attributes, or of another type");
    return value.has_value() ? *value : T{};
  }

  template <class T = void>
  T* data(Name name) const {
    return static_cast<T*>(at(name).untyped_data());
  }

  void shape(Name name, std::initializer_list<int64_t> expected) {
    const auto dimensions = at(name).dimensions();
    bool same = dimensions.size() == expected.size();
    size_t axis = 0;
    for (const int64_t want : expected) {
      same = same && (want == kAny || dimensions[axis] == want);
      ++axis;
    }
    that(same, name, "has shape " + text(dimensions) + ", expected " + text(expected) + " (* is any size)");
  }

  void type(Name name, ffi::DataType expected) {
    that(at(name).element_type() == expected, name, "has the wrong element type for this op");
  }

  Element floating(Name name) {
    const auto type = at(name).element_type();
    that(type == ffi::F32 || type == ffi::BF16, name, "must be float32 or bfloat16");
    return type == ffi::BF16 ? Element::kBFloat16 : Element::kFloat32;
  }

  int32_t* indices(Name name, std::initializer_list<int64_t> expected) {
    type(name, ffi::S32);
    shape(name, expected);
    return data<int32_t>(name);
  }

  float* floats(Name name, std::initializer_list<int64_t> expected) {
    type(name, ffi::F32);
    shape(name, expected);
    return data<float>(name);
  }

  const int32_t* layer(Name name = "layer") {
    type(name, ffi::S32);
    that(at(name).element_count() == 1, name, "must be one int32");
    return data<const int32_t>(name);
  }

  // The step's plan, by the attributes tokens and requests.
  Plan plan() {
    const auto tokens = attribute<int64_t>("tokens"), requests = attribute<int64_t>("requests");
    Plan plan{data<const int32_t>("plan"), static_cast<int>(tokens), static_cast<int>(requests)};
    type("plan", ffi::S32);
    that(tokens >= 0 && requests >= 0, "plan", "has negative tokens or requests");
    if (!failed()) shape("plan", {plan.size()});
    return plan;
  }

  // The attribute ratio; after a mistake one that can be divided by.
  int ratio() {
    const auto ratio = attribute<int64_t>("ratio");
    that(is_ratio(ratio), "ratio", "is that of no kind of layer: " + std::to_string(ratio));
    return is_ratio(ratio) ? static_cast<int>(ratio) : kCsaRatio;
  }

  BlockTable block_table() {
    indices("block_table", {kAny, kAny});
    return {data<const int32_t>("block_table"), static_cast<int>(size("block_table", 0)),
            static_cast<int>(size("block_table", 1))};
  }

  // A pool [layers, pages, rows, width] or, quantized, [layers, pages, page_bytes], with `rows` rows to a page.
  Pool pool(Name name, int rows, int width, Name codec, float global_scale) {
    Pool pool{data<uint8_t>(name), size(name, 0), size(name, 1), 0, rows, 0, width, global_scale};
    page(name, 2, codec, pool);
    return pool;
  }

  // The axes from `first` on are one page; completes the pool.
  void page(Name name, size_t first, Name codec, Pool& pool) {
    pool.codec = find_codec(codec.data(), codec.size(), pool.width);
    that(pool.codec >= 0, name,
         "cannot be stored: no codec " + std::string(codec) + " for width " + std::to_string(pool.width));
    if (pool.codec < 0) return;
    visit_codec(pool.width, pool.codec,
                [&](auto found) { pool.page_bytes = Layout<decltype(found)>::page_bytes(pool.rows); });
    const bool plain = codec == "fp32" || codec == "bf16";
    type(name, codec == "fp32" ? ffi::F32 : codec == "bf16" ? ffi::BF16 : ffi::U8);
    const auto dimensions = at(name).dimensions();
    const bool fits =
        plain ? dimensions.size() == first + 2 && dimensions[first] == pool.rows && dimensions[first + 1] == pool.width
              : dimensions.size() == first + 1 && dimensions[first] == pool.page_bytes;
    that(fits, name,
         "has shape " + text(dimensions) + "; a page of " + std::to_string(pool.rows) + " rows of " +
             std::to_string(pool.width) + " in " + std::string(codec) + " has " + std::to_string(pool.page_bytes) +
             " bytes");
  }

  // The sliding window and its positions, of a format that windows have.
  Pool window(Name codec, float global_scale) {
    const int ring = static_cast<int>(size("positions", 2));
    that(is_window_codec(codec), "window", "cannot be stored: windows have no codec " + std::string(codec));
    const Pool window = pool("window", ring, kHeadDim, codec, global_scale);
    indices("positions", {window.layers, window.pages, ring});
    return window;
  }

  Tail tail(Name name, int ratio) {
    TailGeometry geometry{ratio};
    const bool running = ratio == kHcaRatio && rank(name) == 4;
    const int64_t width = size(name, running ? 3 : 4);
    that(width == kHeadDim || width == kKeyDim, name, "has a width other than 512 and 128");
    if (running) {
      const int64_t states = std::max<int64_t>(size(name, 2) / 3, 1);
      floats(name, {kAny, kAny, 3 * states, kHeadDim});
      geometry.depth = static_cast<int>(states) - 1;
    } else {
      floats(name, {kAny, kAny, 2, kAny, kAny});
      const int depth = tail_depth(ratio, size(name, 3));
      that(depth >= 0, name,
           "has " + std::to_string(size(name, 3)) + " rows, which no depth gives: a tail of ratio " +
               std::to_string(ratio) + " has " + std::to_string(geometry.rows()) + " and, for every " +
               (geometry.overlaps() ? std::to_string(ratio) + " tokens of depth, " + std::to_string(2 * ratio) + " more"
                                    : "token of depth, 1 more"));
      geometry.depth = depth;
    }
    return {data<float>(name),       size(name, 0), static_cast<int>(size(name, 1)),
            static_cast<int>(width), geometry,      running};
  }

  // A step's rows for the window, [tokens, 512], with where they go.
  AppendWindowParams append_window(Name codec, float global_scale) {
    AppendWindowParams params{};
    params.window = window(codec, global_scale);
    params.positions = data<int32_t>("positions");
    params.plan = plan();
    shape("rows", {params.plan.tokens, kHeadDim});
    params.element = floating("rows");
    params.rows = data("rows");
    params.layer = layer();
    return params;
  }

  // kv, gate [tokens, columns] and position_bias [ratio, columns] for a tail; `prefix` comes before each name.
  Projections projections(const Tail& tail, int tokens, const std::string& prefix = "") {
    const std::string kv = prefix + "kv", gate = prefix + "gate", bias = prefix + "position_bias";
    const int64_t columns = tail.geometry.overlaps() ? 2 * tail.width : tail.width;
    shape(kv, {tokens, columns});
    shape(gate, {tokens, columns});
    const Element element = floating(kv);
    that(at(kv).element_type() == at(gate).element_type(), gate, "must have the element type of kv");
    return {data(kv), data(gate), element, floats(bias, {tail.geometry.ratio, columns}), static_cast<int>(columns)};
  }

  // How a compressor with this tail finishes its entries: norm_weight [width], cos and sin [closing, 32].
  Compressor compressor(const Tail& tail, const Plan& plan, float eps, bool hadamard, const std::string& prefix = "") {
    const int closing = closing_capacity(plan.tokens, plan.requests, tail.geometry.ratio);
    that(!hadamard || tail.width == kKeyDim, "hadamard", "is for rows of width 128 only");
    return {tail,
            projections(tail, plan.tokens, prefix),
            floats(prefix + "norm_weight", {tail.width}),
            floats(prefix + "cos", {closing, kRopeDim / 2}),
            floats(prefix + "sin", {closing, kRopeDim / 2}),
            eps,
            hadamard};
  }

  // The results of a gather: values [queries, count, width], row_positions and valid [queries, count].
  Rows rows(int width, int64_t queries) {
    const int64_t count = size("values", 1);
    shape("values", {queries, kAny, width});
    shape("valid", {queries, count});
    type("valid", ffi::PRED);
    return {
        data("values"), floating("values"), indices("row_positions", {queries, count}), data<bool>("valid"), queries,
        count};
  }

 private:
  struct Bound {
    Name name;
    ffi::AnyBuffer buffer;
    void* data() const { return buffer.untyped_data(); }
  };

  static ffi::AnyBuffer buffer_of(ffi::AnyBuffer operand) { return operand; }
  static ffi::AnyBuffer buffer_of(ffi::Result<ffi::AnyBuffer> result) { return *result; }

  template <class Get>
  void bind(std::string_view names, Name what, size_t count, const Get& get, std::vector<Bound>& bound) {
    bound.reserve(count);
    const auto expected = static_cast<size_t>(std::count(names.begin(), names.end(), ' ')) + 1;
    that(count == expected, what, "are " + std::to_string(count) + ", expected " + std::string(names));
    for (size_t i = 0; i < count && !failed(); ++i) {
      const size_t end = std::min(names.find(' '), names.size());
      const auto buffer = get(i);
      that(buffer.has_value(), names.substr(0, end), "is not a buffer");
      if (buffer.has_value()) bound.push_back({names.substr(0, end), buffer_of(*buffer)});
      names.remove_prefix(std::min(end + 1, names.size()));
    }
  }

  static const Bound* find(const std::vector<Bound>& bound, Name name) {
    for (const Bound& one : bound) {
      if (one.name == name) return &one;
    }
    return nullptr;
  }

  // By a name of the signature. Handlers run only after all of them are bound.
  const ffi::AnyBuffer& at(Name name) const {
    const Bound* bound = find(operands_, name);
    return bound != nullptr ? bound->buffer : find(results_, name)->buffer;
  }

  template <class Sizes>
  static std::string text(const Sizes& sizes) {
    std::string out = "[";
    for (const int64_t size : sizes) out += (out.size() > 1 ? ", " : "") + (size == kAny ? "*" : std::to_string(size));
    return out + "]";
  }

  Name op_;
  ffi::Dictionary attributes_;
  std::vector<Bound> operands_, results_;
  std::string message_;
};

// Runs `run` on what `check` makes of the call.
template <class Check, class Run>
ffi::Error handle(Call call, Check check, Run run) {
  if (call.failed()) return call.error();
  const auto params = check(call);
  if (call.failed()) return call.error();
  const char* problem = run(params);
  if (problem == nullptr) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, problem);
}

}  // namespace dsv4

// Defines the symbols dsv4_<op>_cpu and, in a CUDA build, dsv4_<op>_cuda: one check, two ways to run.
#define DSV4_CPU_HANDLER(op, kernel)                                                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                                  \
      dsv4_##op##_cpu,                                                                                            \
      [](xla::ffi::RemainingArgs operands, xla::ffi::RemainingRets results, xla::ffi::Dictionary attributes) {    \
        return dsv4::handle(dsv4::Call(dsv4::signature_of_##op, operands, results, attributes), dsv4::check_##op, \
                            [](const auto& params) -> const char* {                                               \
                              const dsv4::KeepDenormals guard;                                                    \
                              dsv4::cpu::kernel(params);                                                          \
                              return nullptr;                                                                     \
                            });                                                                                   \
      },                                                                                                          \
      xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs(), {xla::ffi::Traits::kCmdBufferCompatible})
#ifdef DSV4_WITH_CUDA
#define DSV4_CUDA_HANDLER(op, kernel)                                                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                                   \
      dsv4_##op##_cuda,                                                                                            \
      [](CUstream_st* stream, xla::ffi::RemainingArgs operands, xla::ffi::RemainingRets results,                   \
         xla::ffi::Dictionary attributes) {                                                                        \
        return dsv4::handle(dsv4::Call(dsv4::signature_of_##op, operands, results, attributes).aligned(),          \
                            dsv4::check_##op,                                                                      \
                            [stream](const auto& params) { return dsv4::cuda::kernel(stream, params); });          \
      },                                                                                                           \
      xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<CUstream_st*>>().RemainingArgs().RemainingRets().Attrs(), \
      {xla::ffi::Traits::kCmdBufferCompatible})
#else
#define DSV4_CUDA_HANDLER(op, kernel) static_assert(true)
#endif
#define DSV4_HANDLERS(op, kernel) \
  DSV4_CPU_HANDLER(op, kernel);   \
  DSV4_CUDA_HANDLER(op, kernel)
