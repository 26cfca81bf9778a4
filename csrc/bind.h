// What bindings.cpp puts together: a file per family of ops.
#pragma once

#include <pybind11/pybind11.h>

namespace lora_fuse {

void bind_launches(pybind11::module_& m);
void bind_normals(pybind11::module_& m);
void bind_topk(pybind11::module_& m);
void bind_positions(pybind11::module_& m);
void bind_sparse(pybind11::module_& m);

}  // namespace lora_fuse
