#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bind.h"
#include "launches.h"
#include "tensors.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

constexpr uintptr_t kAlign = 16;  // what kernels are specialised on

void append(std::string* key, int64_t value) { key->append(reinterpret_cast<const char*>(&value), sizeof value); }

// A parameter of a kernel: an address that changes from call to call, or bytes that do not.
struct Parameter {
  int base;  // which of the operands and scratch tensors, -1: none
  int64_t value;  // added to the address
};

// cuLaunchKernel of the driver API.
using LaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                             unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
constexpr int kNoContext = 201;  // CUDA_ERROR_INVALID_CONTEXT: this thread has not used the device yet

struct Step {
  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  std::vector<Parameter> parameters;  // little-endian, so that the driver reads as many bytes of a value as there are
};

// Launches made with one call into C++ and the driver, of what `otherwise`, a Python callable, would launch.
struct DirectLaunches {
  LaunchKernel launch;
  int device;
  py::object otherwise, hooked, current_device, current_stream;
  std::vector<py::object> scratch;  // callables that allocate
  std::vector<Step> steps;

  void add(uintptr_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared, const std::vector<std::pair<int, int64_t>>& parameters) {
    Step step{reinterpret_cast<void*>(function), grid, threads, shared, {}};
    for (const auto& [base, value] : parameters) step.parameters.push_back({base, value});
    steps.push_back(std::move(step));
  }

  py::object operator()(const py::tuple& addresses) const {
    if (py::cast<bool>(hooked()) || py::cast<int>(current_device()) != device) return otherwise(addresses);
    std::vector<uint64_t> bases;
    for (const py::handle address : addresses) bases.push_back(PyLong_AsUnsignedLongLong(address.ptr()));
    if (PyErr_Occurred()) throw py::error_already_set();
    std::vector<py::object> held;  // until the launches that use it are in the stream
    for (const py::object& allocate : scratch) {
      held.push_back(allocate());
      bases.push_back(reinterpret_cast<uintptr_t>(view(held.back(), "scratch").data));
    }
    void* const stream = reinterpret_cast<void*>(py::cast<uintptr_t>(current_stream(device)));
    const int status = run(bases, stream);
    if (status == kNoContext) return otherwise(addresses);
    if (status) throw std::runtime_error("CUDA: a kernel launch failed with error " + std::to_string(status));
    return py::bool_(true);
  }

  int run(const std::vector<uint64_t>& bases, void* stream) const {
    const py::gil_scoped_release nogil;
    std::vector<uint64_t> values;
    std::vector<void*> pointers;
    for (const Step& step : steps) {
      values.clear(), pointers.clear();
      for (const Parameter& p : step.parameters) values.push_back((p.base < 0 ? 0 : bases.at(p.base)) + uint64_t(p.value));
      for (uint64_t& value : values) pointers.push_back(&value);
      const int status = launch(step.function, step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1, step.shared, stream,
                                pointers.data(), nullptr);
      if (status) return status;
    }
    return 0;
  }
};

py::object key_of(const py::tuple& operands) {
  std::string key;
  py::tuple addresses;
  if (!read_operands(&PyTuple_GET_ITEM(operands.ptr(), 0), PyTuple_GET_SIZE(operands.ptr()), &key, &addresses)) return py::none();
  return py::bytes(key);
}

}  // namespace

bool read_operands(PyObject* const* operands, Py_ssize_t count, std::string* key, py::tuple* addresses) {
  *addresses = py::tuple(count);
  key->reserve(size_t(count) * 48);
  for (Py_ssize_t i = 0; i < count; ++i) {
    uintptr_t address = 0;
    if (operands[i] == Py_None) {
      append(key, -1);
    } else if (PyLong_CheckExact(operands[i])) {
      append(key, -2);
      append(key, PyLong_AsLongLong(operands[i]));
      if (PyErr_Occurred()) throw py::error_already_set();
    } else {
      TensorView v;
      if (!try_view(operands[i], &v) || (!v.data && count_of(v)) || !v.dtype.bits || !v.device.type) return false;
      address = reinterpret_cast<uintptr_t>(v.data);
      append(key, int64_t(v.ndim) << 48 | int64_t(v.dtype.code) << 40 | int64_t(v.dtype.bits) << 32 | int64_t(address % kAlign));
      append(key, int64_t(v.device.type) << 32 | v.device.id);
      for (int d = 0; d < v.ndim; ++d) append(key, v.shape[d]), append(key, v.strides[d]);
    }
    PyTuple_SET_ITEM(addresses->ptr(), i, PyLong_FromUnsignedLongLong(address));
  }
  return true;
}

bool launch_again(py::handle ready, PyObject* const* operands, Py_ssize_t count) {
  if (!PyDict_CheckExact(ready.ptr()) || PyDict_GET_SIZE(ready.ptr()) == 0) return false;
  std::string key;
  py::tuple addresses;
  if (!read_operands(operands, count, &key, &addresses)) return false;
  const py::bytes name(key);
  const auto found = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(ready.ptr(), name.ptr()));
  if (!found) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return false;
  }
  if (py::isinstance<DirectLaunches>(found)) return found.cast<const DirectLaunches&>()(addresses).is(py::handle(Py_True));
  PyObject* const result = PyObject_CallOneArg(found.ptr(), addresses.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result).is(py::handle(Py_True));
}

void bind_launches(py::module_& m) {
  py::class_<DirectLaunches>(m, "DirectLaunches")
      .def(py::init([](uintptr_t launch, int device, py::object otherwise, py::object hooked, py::object current_device,
                       py::object current_stream, std::vector<py::object> scratch) {
        return DirectLaunches{reinterpret_cast<LaunchKernel>(launch), device, std::move(otherwise), std::move(hooked),
                              std::move(current_device), std::move(current_stream), std::move(scratch), {}};
      }))
      .def("add", &DirectLaunches::add)
      .def("__call__", &DirectLaunches::operator());
  m.def("operand_key", &key_of);
  m.def("launch_again", [](const py::dict& ready, const py::tuple& operands) {
    return launch_again(ready, &PyTuple_GET_ITEM(operands.ptr(), 0), PyTuple_GET_SIZE(operands.ptr()));
  });
}

}  // namespace lora_fuse
