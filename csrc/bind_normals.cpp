// A tensor in, filled with normal numbers: checks and GIL release. No arithmetic.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "eager.h"
#include "normals.h"
#include "tensors.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

void normals(py::handle out, uint64_t seed, uint32_t draw, int threads) {
  const TensorView v = host(out, "out");
  if (v.ndim != 3 || !same(v.dtype, kFloat32) || !is_contiguous(v))
    fail("out: expected contiguous float32 [matrices, rows, cols], got " + show(v.dtype) + " of shape " + show(v));
  const int64_t most = INT64_C(1) << 32;  // a counter's words
  if (v.shape[0] > most || v.shape[1] > most || v.shape[2] > most) fail("out: shape " + show(v) + " has a side above 2**32");
  {
    py::gil_scoped_release nogil;
    fill_normals(reinterpret_cast<float*>(v.data), v.shape[0], v.shape[1], v.shape[2], seed, draw, threads);
  }
  bump_version(out);
}

}  // namespace

void bind_normals(py::module_& m) { m.def("normals", &normals); }

}  // namespace lora_fuse
