#include <pybind11/pybind11.h>

#include "bind.h"

namespace lora_fuse {

void bind_sparse(pybind11::module_&) {}

}  // namespace lora_fuse
