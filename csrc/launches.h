// Kernel launches on a GPU that were made before, found again by what they depend on. No CUDA header here: what was found
// is a Python callable that takes the operands' addresses, or DirectLaunches, which call the driver where it lies.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace lora_fuse {

// All that launches may depend on, of operands that are tensors, integers or None: values, dtypes, devices, shapes,
// strides, and addresses modulo 16. False where an operand has no strided memory.
bool read_operands(PyObject* const* operands, Py_ssize_t count, std::string* key, pybind11::tuple* addresses);

// Calls what `ready`, a dict, has under the operands' key with their addresses. False, and nothing done, if there is
// nothing, or it declines.
bool launch_again(pybind11::handle ready, PyObject* const* operands, Py_ssize_t count);

}  // namespace lora_fuse
