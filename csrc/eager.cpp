#include "eager.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

// References kept for good: a module's globals, which outlive every caller.
struct Queries {
  PyObject *tensor_type, *parameter_type;
  PyObject *grad_enabled, *dispatch_modes, *function_mode, *functorch_level, *any_autocast, *tracing_state, *forward_ad, *current_stream;
  PyObject *increment_version, *num_threads;
} queries{};

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object call(PyObject* f) {
  PyObject* const result = PyObject_CallNoArgs(f);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object method(py::handle t, PyObject* name) {
  PyObject* const result = PyObject_CallMethodNoArgs(t.ptr(), name);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool truth(const py::object& value) {
  if (value.ptr() == Py_False || value.ptr() == Py_None) return false;
  const int yes = PyObject_IsTrue(value.ptr());
  if (yes < 0) throw py::error_already_set();
  return yes;
}

bool requires_grad(py::handle t) {
  static PyObject* const name = interned("requires_grad");
  PyObject* const result = PyObject_GetAttr(t.ptr(), name);
  if (!result) throw py::error_already_set();
  return truth(py::reinterpret_steal<py::object>(result));
}

bool negative(py::handle t) {
  static PyObject* const name = interned("is_neg");
  return truth(method(t, name));
}

bool forward_ad_level() {
  static PyObject* const name = interned("_current_level");
  PyObject* const level = PyObject_GetAttr(queries.forward_ad, name);
  if (!level) throw py::error_already_set();
  return PyLong_AsLong(py::reinterpret_steal<py::object>(level).ptr()) >= 0;
}

}  // namespace

void set_eager_queries(py::dict given) {
  const auto take = [&](const char* name) { return py::object(given[name]).release().ptr(); };
  queries = {take("tensor_type"),    take("parameter_type"),  take("grad_enabled"), take("dispatch_modes"),
             take("function_mode"),  take("functorch_level"), take("any_autocast"), take("tracing_state"),
             take("forward_ad"),     take("current_stream"),  take("increment_version"), take("num_threads")};
}

bool may_bypass(py::handle x, py::handle out, py::handle weights, bool fresh) {
  PyObject* const kind = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
  if (kind != queries.tensor_type && kind != queries.parameter_type) return false;
  if (!out.is_none() && reinterpret_cast<PyObject*>(Py_TYPE(out.ptr())) != queries.tensor_type) return false;
  if (truth(call(queries.grad_enabled)) && (requires_grad(x) || (!weights.is_none() && requires_grad(weights)) ||
                                            (!out.is_none() && requires_grad(out))))
    return false;
  if (truth(call(queries.dispatch_modes)) || truth(call(queries.function_mode)) || !call(queries.functorch_level).is_none() ||
      forward_ad_level() ||  // a dual tensor may be among the arguments
      truth(call(queries.any_autocast)) || !call(queries.tracing_state).is_none())
    return false;
  return !(negative(x) || (!fresh && !out.is_none() && negative(out)));  // the memory would hold the negative
}

bool on_default_stream(int device) {
  if (queries.current_stream == Py_None) return false;
  const auto index = py::int_(device);
  PyObject* const stream = PyObject_CallOneArg(queries.current_stream, index.ptr());
  if (!stream) throw py::error_already_set();
  return !truth(py::reinterpret_steal<py::object>(stream));  // the default one is null
}

void bump_version(py::handle t) {
  static PyObject* const is_inference = interned("is_inference");
  if (truth(method(t, is_inference))) return;  // has none
  const py::tuple one = py::make_tuple(t);
  PyObject* const result = PyObject_CallOneArg(queries.increment_version, one.ptr());
  if (!result) throw py::error_already_set();
  Py_DECREF(result);
}

int num_threads() { return int(PyLong_AsLong(call(queries.num_threads).ptr())); }

}  // namespace lora_fuse
