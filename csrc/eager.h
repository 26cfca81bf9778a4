// Whether torch is in plain eager mode, asked from C++ so that a kernel call costs no Python frames.
#pragma once

#include <pybind11/pybind11.h>

namespace lora_fuse {

// The callables and types to ask, by name; ops/eager.py gives them once at import.
void set_eager_queries(pybind11::dict queries);

// True for plain tensors with nothing to record and nobody who wants to see the call. out and weights may be
// None; fresh: out has just been made, as no view.
bool may_bypass(pybind11::handle x, pybind11::handle out, pybind11::handle weights, bool fresh);

bool on_default_stream(int device);         // of CUDA; false where torch has no CUDA
void bump_version(pybind11::handle t);  // an in-place write has happened; nothing for inference tensors
int num_threads();                      // torch.get_num_threads()

}  // namespace lora_fuse
