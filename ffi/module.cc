// The Python module dsv4_jax_native: hands the FFI handlers to Python as capsules, and says what it was built with.

#include <nanobind/nanobind.h>

#include <sstream>
#include <string>
#include <vector>

#include "layout/codecs.h"
#include "layout/plan.h"
#include "ops/signatures.h"
#include "xla/ffi/api/c_api.h"

#ifdef DSV4_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nb = nanobind;

#define DSV4_DECLARE_HANDLER(op, ...) extern "C" XLA_FFI_Error* dsv4_##op##_cpu(XLA_FFI_CallFrame*);
DSV4_OPS(DSV4_DECLARE_HANDLER)
#undef DSV4_DECLARE_HANDLER

#ifdef DSV4_WITH_CUDA
#define DSV4_DECLARE_HANDLER(op, ...) extern "C" XLA_FFI_Error* dsv4_##op##_cuda(XLA_FFI_CallFrame*);
DSV4_OPS(DSV4_DECLARE_HANDLER)
#undef DSV4_DECLARE_HANDLER
#endif

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Registrations() {
  nb::dict cpu;
#define DSV4_REGISTER(op, ...) cpu["dsv4_" #op] = Capsule(dsv4_##op##_cpu);
  DSV4_OPS(DSV4_REGISTER)
#undef DSV4_REGISTER

  nb::dict platforms;
  platforms["cpu"] = cpu;

#ifdef DSV4_WITH_CUDA
  nb::dict cuda;
#define DSV4_REGISTER(op, ...) cuda["dsv4_" #op] = Capsule(dsv4_##op##_cuda);
  DSV4_OPS(DSV4_REGISTER)
#undef DSV4_REGISTER
  // JAX takes "cuda" too, and registers nothing under it without a word.
  platforms["CUDA"] = cuda;
#endif
  return platforms;
}

// The tables that Python keeps too, to be held against them: op -> operands, results and attributes.
nb::dict Signatures() {
  nb::dict signatures;
#define DSV4_SIGNATURE(op, kernel, Params, operands, results, attributes) \
  signatures[#op] = nb::make_tuple(operands, results, attributes);
  DSV4_OPS(DSV4_SIGNATURE)
#undef DSV4_SIGNATURE
  return signatures;
}

// (codec, width) -> bytes of a row's data, of its scales, and what a page's size is a multiple of.
template <class... Codecs>
void PutCodecs(dsv4::CodecList<Codecs...>, nb::dict& codecs) {
  ((codecs[nb::make_tuple(Codecs::kName, Codecs::kWidth)] = nb::make_tuple(
        dsv4::Layout<Codecs>::kDataBytes, dsv4::Layout<Codecs>::kScaleBytes, static_cast<int>(Codecs::kPageMultiple))),
   ...);
}

nb::dict CodecTable() {
  nb::dict codecs;
  PutCodecs(dsv4::HeadCodecs{}, codecs);
  PutCodecs(dsv4::KeyCodecs{}, codecs);
  return codecs;
}

// Kind -> its row of the table, and the rows of its tail.
nb::dict Kinds() {
  nb::dict kinds;
  constexpr dsv4::KindTable table{};
  for (const dsv4::Kind& kind : table.rows) {
    kinds[kind.name] = nb::make_tuple(kind.ratio, kind.overlap, kind.gate, kind.position_bias, kind.indexed,
                                      dsv4::TailGeometry{kind.ratio}.rows());
  }
  return kinds;
}

// Where the kernels look for each field of a packed plan, to be held against PlanLayout in dsv4_jax/layout/plan.py.
nb::dict PlanOffsets(int tokens, int requests) {
  // Room for any plan of this layout, so that every field lies within it.
  const std::vector<int32_t> packed(static_cast<size_t>(16) * (tokens + requests + 1));
  const dsv4::Plan plan{packed.data(), tokens, requests};
  nb::dict offsets;
  const auto put = [&](const char* name, const int32_t* field) { offsets[name] = field - packed.data(); };
  put("token_slot", plan.token_slot());
  put("token_position", plan.token_position());
  put("token_request", plan.token_request());
  put("request_slot", plan.request_slot());
  put("request_reset", plan.request_reset());
  put("query_start", plan.query_start());
  put("table_slot", plan.table_slot());
  put("table_index", plan.table_index());
  put("table_block", plan.table_block());
  put("closing_4", plan.closing(dsv4::kCsaRatio));
  put("closing_128", plan.closing(dsv4::kHcaRatio));
  put("longest", plan.longest());
  return offsets;
}

// What the kernels were compiled for, as CMakeLists.txt lists it: "90,90-virtual".
nb::tuple CudaArchitectures() {
  nb::list architectures;
#ifdef DSV4_WITH_CUDA
  std::stringstream all(DSV4_CUDA_ARCHITECTURES);
  for (std::string one; std::getline(all, one, ',');) architectures.append(nb::str(one.c_str()));
#endif
  return nb::tuple(architectures);
}

}  // namespace

NB_MODULE(dsv4_jax_native, m) {
  m.def("registrations", &Registrations);
  m.def("signatures", &Signatures);
  m.def("codecs", &CodecTable);
  m.def("kinds", &Kinds);
  m.def("plan_offsets", &PlanOffsets, nb::arg("tokens"), nb::arg("requests"));
  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("cuda_architectures", &CudaArchitectures);
  m.def("cuda_version", [] {
#ifdef DSV4_WITH_CUDA
    return CUDART_VERSION;
#else
    return 0;
#endif
  });
}
