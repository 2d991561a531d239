// The Python module dsv4_jax_native: hands the FFI handlers to Python as capsules, and says what it was built with.
// It keeps to Python's stable ABI, so that one library, with its kernels, serves every Python from 3.11 on.

#define Py_LIMITED_API 0x030B0000
#include <Python.h>
// Before any other header, as Python's documentation asks.

#include <memory>
#include <new>
#include <vector>

#include "layout/codecs.h"
#include "layout/plan.h"
#include "ops/signatures.h"
#include "xla/ffi/api/c_api.h"

#ifdef DSV4_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#define DSV4_DECLARE_HANDLER(op, ...) extern "C" XLA_FFI_Error* dsv4_##op##_cpu(XLA_FFI_CallFrame*);
DSV4_OPS(DSV4_DECLARE_HANDLER)
#undef DSV4_DECLARE_HANDLER

#ifdef DSV4_WITH_CUDA
#define DSV4_DECLARE_HANDLER(op, ...) extern "C" XLA_FFI_Error* dsv4_##op##_cuda(XLA_FFI_CallFrame*);
DSV4_OPS(DSV4_DECLARE_HANDLER)
#undef DSV4_DECLARE_HANDLER
#endif

namespace {

// A reference that is given back to Python. Null means that a call failed, and that Python knows why.
struct GiveBack {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, GiveBack>;

// A dict in the making; null once anything that was put into it is.
class Dict {
 public:
  // Takes over both references.
  void Put(PyObject* key, PyObject* value) {
    const Owned owned_key(key), owned_value(value);
    if (!dict_ || !key || !value || PyDict_SetItem(dict_.get(), key, value) != 0) dict_.reset();
  }
  void Put(const char* key, PyObject* value) { Put(PyUnicode_FromString(key), value); }
  PyObject* Release() { return dict_.release(); }

 private:
  Owned dict_{PyDict_New()};
};

PyObject* Capsule(XLA_FFI_Handler* handler) {
  return PyCapsule_New(reinterpret_cast<void*>(handler), nullptr, nullptr);
}

PyObject* Registrations(PyObject*, PyObject*) {
  Dict cpu;
#define DSV4_REGISTER(op, ...) cpu.Put("dsv4_" #op, Capsule(dsv4_##op##_cpu));
  DSV4_OPS(DSV4_REGISTER)
#undef DSV4_REGISTER

  Dict platforms;
  platforms.Put("cpu", cpu.Release());

#ifdef DSV4_WITH_CUDA
  Dict cuda;
#define DSV4_REGISTER(op, ...) cuda.Put("dsv4_" #op, Capsule(dsv4_##op##_cuda));
  DSV4_OPS(DSV4_REGISTER)
#undef DSV4_REGISTER
  // JAX takes "cuda" too, and registers nothing under it without a word.
  platforms.Put("CUDA", cuda.Release());
#endif
  return platforms.Release();
}

// The tables that Python keeps too, to be held against them: op -> operands, results and attributes.
PyObject* Signatures(PyObject*, PyObject*) {
  Dict signatures;
#define DSV4_SIGNATURE(op, kernel, Params, operands, results, attributes) \
  signatures.Put(#op, Py_BuildValue("(sss)", operands, results, attributes));
  DSV4_OPS(DSV4_SIGNATURE)
#undef DSV4_SIGNATURE
  return signatures.Release();
}

// (codec, width) -> bytes of a row's data, of its scales, and what a page's size is a multiple of.
template <class... Codecs>
void PutCodecs(dsv4::CodecList<Codecs...>, Dict& codecs) {
  (codecs.Put(
       Py_BuildValue("(si)", Codecs::kName, static_cast<int>(Codecs::kWidth)),
       Py_BuildValue("(iii)", static_cast<int>(dsv4::Layout<Codecs>::kDataBytes),
                     static_cast<int>(dsv4::Layout<Codecs>::kScaleBytes), static_cast<int>(Codecs::kPageMultiple))),
   ...);
}

PyObject* CodecTable(PyObject*, PyObject*) {
  Dict codecs;
  PutCodecs(dsv4::HeadCodecs{}, codecs);
  PutCodecs(dsv4::KeyCodecs{}, codecs);
  return codecs.Release();
}

// Kind -> its row of the table, and the rows of its tail.
PyObject* Kinds(PyObject*, PyObject*) {
  Dict kinds;
  constexpr dsv4::KindTable table{};
  for (const dsv4::Kind& kind : table.rows) {
    kinds.Put(kind.name,
              Py_BuildValue("(iNNNNi)", kind.ratio, PyBool_FromLong(kind.overlap), PyBool_FromLong(kind.gate),
                            PyBool_FromLong(kind.position_bias), PyBool_FromLong(kind.indexed),
                            static_cast<int>(dsv4::TailGeometry{kind.ratio}.rows())));
  }
  return kinds.Release();
}

// Where the kernels look for each field of a packed plan, to be held against PlanLayout in dsv4_jax/layout/plan.py.
PyObject* PlanOffsets(PyObject*, PyObject* arguments) {
  int tokens, requests;
  if (!PyArg_ParseTuple(arguments, "ii:plan_offsets", &tokens, &requests)) return nullptr;
  if (tokens < 0 || requests < 0) {
    return PyErr_Format(PyExc_ValueError, "%d tokens of %d requests: neither may be negative", tokens, requests);
  }
  try {
    // Room for any plan of this layout, so that every field lies within it.
    const std::vector<int32_t> packed((size_t{1} + tokens + requests) * 16);
    const dsv4::Plan plan{packed.data(), tokens, requests};
    Dict offsets;
    const auto put = [&](const char* name, const int32_t* field) {
      offsets.Put(name, PyLong_FromSsize_t(field - packed.data()));
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
    return offsets.Release();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyObject* FfiApiVersion(PyObject*, PyObject*) { return Py_BuildValue("(ii)", XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); }

PyObject* CudaVersion(PyObject*, PyObject*) {
#ifdef DSV4_WITH_CUDA
  return PyLong_FromLong(CUDART_VERSION);
#else
  return PyLong_FromLong(0);
#endif
}

// What the kernels were compiled for, as CMakeLists.txt lists it: "90,90-virtual".
PyObject* CudaArchitectures(PyObject*, PyObject*) {
#ifdef DSV4_WITH_CUDA
  const Owned all(PyUnicode_FromString(DSV4_CUDA_ARCHITECTURES)), comma(PyUnicode_FromString(","));
  if (!all || !comma) return nullptr;
  const Owned each(PyUnicode_Split(all.get(), comma.get(), -1));
  return each ? PyList_AsTuple(each.get()) : nullptr;
#else
  return PyTuple_New(0);
#endif
}

// dsv4_jax_native.pyi documents them.
PyMethodDef functions[] = {
    {"registrations", Registrations, METH_NOARGS, nullptr},
    {"signatures", Signatures, METH_NOARGS, nullptr},
    {"codecs", CodecTable, METH_NOARGS, nullptr},
    {"kinds", Kinds, METH_NOARGS, nullptr},
    {"plan_offsets", PlanOffsets, METH_VARARGS, nullptr},
    {"ffi_api_version", FfiApiVersion, METH_NOARGS, nullptr},
    {"cuda_version", CudaVersion, METH_NOARGS, nullptr},
    {"cuda_architectures", CudaArchitectures, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "dsv4_jax_native", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit_dsv4_jax_native() { return PyModuleDef_Init(&module_definition); }
