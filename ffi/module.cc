// The Python module dsv4_jax_native: hands the FFI handlers to Python as capsules, and says what it was built with.

#include <nanobind/nanobind.h>

#include "layout/plan.h"
#include "ops/targets.h"
#include "xla/ffi/api/c_api.h"

#ifdef DSV4_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nb = nanobind;

#define DSV4_DECLARE_CPU(name, Symbol) extern "C" XLA_FFI_Error* Dsv4##Symbol##Cpu(XLA_FFI_CallFrame*);
DSV4_TARGETS(DSV4_DECLARE_CPU)

#ifdef DSV4_WITH_CUDA
#define DSV4_DECLARE_CUDA(name, Symbol) extern "C" XLA_FFI_Error* Dsv4##Symbol##Cuda(XLA_FFI_CallFrame*);
DSV4_TARGETS(DSV4_DECLARE_CUDA)
#endif

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Registrations() {
  nb::dict cpu;
#define DSV4_REGISTER_CPU(name, Symbol) cpu["dsv4_" #name] = Capsule(Dsv4##Symbol##Cpu);
  DSV4_TARGETS(DSV4_REGISTER_CPU)

  nb::dict platforms;
  platforms["cpu"] = cpu;

#ifdef DSV4_WITH_CUDA
  nb::dict cuda;
#define DSV4_REGISTER_CUDA(name, Symbol) cuda["dsv4_" #name] = Capsule(Dsv4##Symbol##Cuda);
  DSV4_TARGETS(DSV4_REGISTER_CUDA)
  // JAX takes "cuda" too, and registers nothing under it without a word.
  platforms["CUDA"] = cuda;
#endif
  return platforms;
}

// Where the kernels look for each field of a packed plan, to be held against PlanLayout in dsv4_jax/layout/plan.py.
nb::dict PlanOffsets(int tokens, int requests) {
  static const int32_t start = 0;
  const dsv4::Plan plan{&start, tokens, requests};
  nb::dict offsets;
  const auto put = [&](const char* name, const int32_t* field) {
    offsets[name] = (reinterpret_cast<intptr_t>(field) - reinterpret_cast<intptr_t>(&start)) /
                    static_cast<intptr_t>(sizeof(int32_t));
  };
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

}  // namespace

NB_MODULE(dsv4_jax_native, m) {
  m.def("registrations", &Registrations);
  m.def("plan_offsets", &PlanOffsets, nb::arg("tokens"), nb::arg("requests"));
  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("cuda_version", [] {
#ifdef DSV4_WITH_CUDA
    return CUDART_VERSION;
#else
    return 0;
#endif
  });
}
