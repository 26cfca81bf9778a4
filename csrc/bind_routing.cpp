#include "bind_routing.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

// Every index that a kernel will follow is checked here, before any is followed.
void check_routing(const RoutingView& r, int64_t num_rows) {
  const auto check_starts = [](const char* name, const int32_t* starts, int64_t n, int32_t total) {
    bool ok = starts[0] == 0 && starts[n] == total;
    for (int64_t i = 0; i < n; ++i) ok &= starts[i] <= starts[i + 1];
    if (!ok) fail(std::string(name) + ": must rise from 0 to the number of pairs, " + std::to_string(total));
  };
  check_starts("segment_starts", r.starts, r.num_slots, r.num_pairs);
  const auto check_range = [](const char* name, const int32_t* v, int32_t n, int64_t bound) {
    uint32_t worst = 0;  // as unsigned, a negative value is the largest
    for (int32_t i = 0; i < n; ++i) worst = uint32_t(v[i]) > worst ? uint32_t(v[i]) : worst;
    if (n > 0 && int64_t(worst) >= bound)
      fail(std::string(name) + ": value " + std::to_string(int32_t(worst)) + " is out of range, accepted are 0 to " + std::to_string(bound - 1));
  };
  check_range("rows", r.rows, r.num_pairs, num_rows);
  if (r.row_starts) {
    check_starts("row_starts", r.row_starts, num_rows, r.num_pairs);
    check_range("row_pairs", r.row_pairs, r.num_pairs, r.num_pairs);
    return;
  }
  // Without row_starts no row may occur twice: two threads would write it. Rows rise within a slot; across slots a
  // bitmap would cost an allocation, so the promise is Routing's for slots, and checked within each.
  for (int s = 0; s < r.num_slots; ++s)
    for (int32_t i = r.starts[s] + 1; i < r.starts[s + 1]; ++i)
      if (r.rows[i] <= r.rows[i - 1]) fail("rows: must rise within each slot; a row with several pairs needs row_starts and row_pairs");
}

}  // namespace

RoutingView read_routing(const py::tuple& route, int64_t num_slots, int64_t num_rows) {
  if (route.size() != 5) fail("routing: expected 5 tensors");
  const auto at = [&](int i) { return py::handle(PyTuple_GET_ITEM(route.ptr(), i)); };
  const py::handle weights = at(1), row_starts = at(3), row_pairs = at(4);
  const TensorView rv = host(at(0), "rows"), sv = host(at(2), "segment_starts");
  const int64_t num_pairs = rv.ndim == 1 ? rv.shape[0] : 0;
  expect_vector(rv, "rows", kInt32, "int32", num_pairs);
  expect_vector(sv, "segment_starts", kInt32, "int32", num_slots + 1);
  RoutingView routing{reinterpret_cast<int32_t*>(rv.data), nullptr, reinterpret_cast<int32_t*>(sv.data), nullptr, nullptr,
                      int32_t(num_pairs), int32_t(num_slots)};
  if (!weights.is_none()) {
    const TensorView w = host(weights, "weights");
    expect_vector(w, "weights", kFloat32, "float32", num_pairs);
    routing.weights = reinterpret_cast<float*>(w.data);
  }
  if (row_starts.is_none() != row_pairs.is_none()) fail("row_starts, row_pairs: give both or neither");
  if (!row_starts.is_none()) {
    const TensorView starts = host(row_starts, "row_starts"), pairs = host(row_pairs, "row_pairs");
    expect_vector(starts, "row_starts", kInt32, "int32", num_rows + 1);
    expect_vector(pairs, "row_pairs", kInt32, "int32", num_pairs);
    routing.row_starts = reinterpret_cast<int32_t*>(starts.data);
    routing.row_pairs = reinterpret_cast<int32_t*>(pairs.data);
  }
  check_routing(routing, num_rows);
  return routing;
}

bool has_rows_of(const TensorView& x, py::handle routing) {
  static PyObject* const name = PyUnicode_InternFromString("num_rows");
  PyObject* const num_rows = PyObject_GetAttr(routing.ptr(), name);
  if (!num_rows) throw py::error_already_set();
  const int64_t want = PyLong_AsLongLong(py::reinterpret_steal<py::object>(num_rows).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) rows *= x.shape[i];
  return rows == want;
}

}  // namespace lora_fuse
