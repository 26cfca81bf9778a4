// The Python side: tensors to views, checks, GIL release. No arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>

#include "dispatch.h"
#include "dlpack_abi.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

using dlpack::DataType;

const dlpack::ExchangeApi* exchange_api = nullptr;  // set once at import; null: read tensors through their attributes

// A tensor as the kernels need it: up to 8 dimensions, host memory, borrowed.
struct TensorView {
  char* data;
  int ndim;
  int64_t shape[8], strides[8];
  DataType dtype;
  bool on_cpu;
};

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

TensorView through_attributes(py::handle t, const char* name) {
  TensorView v{};
  if (!py::hasattr(t, "data_ptr")) throw py::type_error(std::string(name) + ": expected a torch.Tensor");
  v.on_cpu = t.attr("device").attr("type").cast<std::string>() == "cpu";
  v.data = reinterpret_cast<char*>(t.attr("data_ptr")().cast<uintptr_t>());
  const py::tuple shape = t.attr("shape"), strides = t.attr("stride")();
  v.ndim = int(shape.size());
  if (v.ndim > 8) fail(std::string(name) + ": more than 8 dimensions");
  for (int i = 0; i < v.ndim; ++i) v.shape[i] = shape[i].cast<int64_t>(), v.strides[i] = strides[i].cast<int64_t>();
  const std::string dtype = py::str(t.attr("dtype"));
  if (dtype == "torch.float32") v.dtype = {dlpack::kFloat, 32, 1};
  else if (dtype == "torch.float16") v.dtype = {dlpack::kFloat, 16, 1};
  else if (dtype == "torch.bfloat16") v.dtype = {dlpack::kBfloat, 16, 1};
  else if (dtype == "torch.int32") v.dtype = {dlpack::kInt, 32, 1};
  return v;  // any other: {0, 0, 0}, which matches nothing
}

TensorView view(py::handle t, const char* name) {
  dlpack::Tensor d;
  if (!exchange_api) return through_attributes(t, name);
  if (exchange_api->tensor_from_py_object(t.ptr(), &d) != 0) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": expected a strided torch.Tensor");
  }
  if (d.ndim > 8) fail(std::string(name) + ": more than 8 dimensions");
  TensorView v;
  v.data = static_cast<char*>(d.data) + d.byte_offset;
  v.ndim = d.ndim;
  v.dtype = d.dtype;
  v.on_cpu = d.device.type == dlpack::kCPU;
  int64_t dense = 1;
  for (int i = d.ndim - 1; i >= 0; --i) {
    v.shape[i] = d.shape[i];
    v.strides[i] = d.strides ? d.strides[i] : dense;
    dense *= d.shape[i];
  }
  return v;
}

// Tensors may claim elements and own no memory: freed storages, torch's zero tensors.
void expect_memory(const TensorView& v, const char* name) {
  bool empty = false;
  for (int i = 0; i < v.ndim; ++i) empty |= v.shape[i] == 0;
  if (!v.data && !empty) fail(std::string(name) + ": its storage is not allocated");
}

TensorView host(py::handle t, const char* name) {
  const TensorView v = view(t, name);
  if (!v.on_cpu) fail(std::string(name) + ": expected a CPU tensor, as x is");
  expect_memory(v, name);
  return v;
}

std::string show(DataType t) {
  const char* const kind = t.code == dlpack::kFloat ? "float" : t.code == dlpack::kBfloat ? "bfloat" : t.code == dlpack::kInt ? "int" : "type ";
  return kind + std::to_string(t.bits);
}

std::string show(const TensorView& v) {
  std::string s = "[";
  for (int i = 0; i < v.ndim; ++i) s += (i ? ", " : "") + std::to_string(v.shape[i]);
  return s + "]";
}

struct Rows {
  int64_t rows, cols, stride;
};

// [..., cols] as [rows, cols] with one stride between rows; false where no such view exists.
bool collapse(const TensorView& v, Rows* out) {
  if (v.ndim < 1) return false;
  const int last = v.ndim - 1;
  out->cols = v.shape[last];
  out->rows = 1;
  out->stride = out->cols;
  if (out->cols > 1 && v.strides[last] != 1) return false;
  bool first = true;
  for (int i = last - 1; i >= 0; --i) {
    if (v.shape[i] == 1) continue;
    if (first) out->stride = v.strides[i], first = false;
    else if (v.shape[i] != 0 && v.strides[i] != out->stride * out->rows) return false;
    out->rows *= v.shape[i];
  }
  return true;
}

constexpr DataType kInt32{dlpack::kInt, 32, 1}, kFloat32{dlpack::kFloat, 32, 1}, kFloat16{dlpack::kFloat, 16, 1},
    kBfloat16{dlpack::kBfloat, 16, 1};
bool same(DataType a, DataType b) { return a.code == b.code && a.bits == b.bits; }
bool has_kernel(DataType t) { return same(t, kFloat32) || same(t, kBfloat16) || same(t, kFloat16); }

void expect_vector(const TensorView& v, const char* name, DataType dtype, const char* dtype_name, int64_t length) {
  if (v.ndim != 1 || !same(v.dtype, dtype) || v.shape[0] != length || (length > 1 && v.strides[0] != 1))
    fail(std::string(name) + ": expected a contiguous " + dtype_name + " tensor of shape [" + std::to_string(length) +
         "], got shape " + show(v));
}

// Half-open byte range that a row view touches.
struct Extent {
  const char *begin, *end;
};
Extent extent(const TensorView& v, const Rows& r) {
  if (r.rows == 0 || r.cols == 0) return {v.data, v.data};
  const int64_t size = v.dtype.bits / 8, far = (r.rows - 1) * r.stride;
  return {v.data + (far < 0 ? far * size : 0), v.data + ((far > 0 ? far : 0) + r.cols) * size};
}
bool overlap(Extent a, Extent b) { return a.begin < b.end && b.begin < a.end; }

// Every index that a kernel will follow is checked here, before any is followed.
void check_routing(const RoutingView& r, int64_t num_rows, const int32_t* slot_rank, int max_rank) {
  for (int s = 0; s < r.num_slots; ++s)
    if (slot_rank[s] < 0 || slot_rank[s] > max_rank)
      fail("slot_rank: slot " + std::to_string(s) + " has rank " + std::to_string(slot_rank[s]) + ", accepted are 0 to " + std::to_string(max_rank));
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

template <class T>
void run(void (*kernel)(const MultiLora<T>&), const TensorView& x, const Rows& xr, const TensorView& y, const Rows& yr,
         const TensorView& a, const Rows& ar, const TensorView& b, const Rows& br, const int32_t* slot_rank,
         const float* slot_scaling, int max_rank, const RoutingView& routing, float* workspace, int threads) {
  const MultiLora<T> call{
      {reinterpret_cast<const T*>(x.data), xr.rows, xr.cols, xr.stride},
      {reinterpret_cast<T*>(y.data), yr.rows, yr.cols, yr.stride},
      {reinterpret_cast<const T*>(a.data), ar.rows, ar.cols, ar.stride},
      {reinterpret_cast<const T*>(b.data), br.rows, br.cols, br.stride},
      slot_rank, slot_scaling, max_rank, routing, workspace, threads};
  py::gil_scoped_release nogil;
  kernel(call);
}

// pool: (pool_a, pool_b, slot_rank, slot_scaling); route: (rows, weights, segment_starts, row_starts, row_pairs).
// Adds into out. False, and nothing done, if this is not for us: another device, a dtype without a kernel, or an x that
// has no [rows, cols] view.
bool multi_lora(py::handle out, py::handle x, const py::tuple& pool, const py::tuple& route, py::handle workspace, int threads) {
  if (pool.size() != 4 || route.size() != 5) fail("pool, routing: expected 4 and 5 tensors");
  const auto at = [](const py::tuple& t, int i) { return py::handle(PyTuple_GET_ITEM(t.ptr(), i)); };
  const py::handle pool_a = at(pool, 0), pool_b = at(pool, 1), slot_rank = at(pool, 2), slot_scaling = at(pool, 3);
  const py::handle rows = at(route, 0), weights = at(route, 1), segment_starts = at(route, 2), row_starts = at(route, 3),
                   row_pairs = at(route, 4);
  const TensorView xv = view(x, "x");
  Rows xr, yr, ar, br;
  if (!xv.on_cpu || !has_kernel(xv.dtype) || !collapse(xv, &xr)) return false;
  expect_memory(xv, "x");
  const TensorView yv = host(out, "out"), av = host(pool_a, "pool_a"), bv = host(pool_b, "pool_b");
  if (!collapse(yv, &yr) || (yr.rows > 1 && yr.stride < yr.cols))
    fail("out: expected unit stride in the last dimension and one stride between rows, got shape " + show(yv));
  if (av.ndim != 2 || bv.ndim != 2 || !collapse(av, &ar) || !collapse(bv, &br))
    fail("pool_a, pool_b: expected two dimensions and unit stride in the last");
  if (!same(xv.dtype, yv.dtype) || !same(xv.dtype, av.dtype) || !same(xv.dtype, bv.dtype))
    fail("x, out, pool_a, pool_b: dtypes differ (" + show(xv.dtype) + ", " + show(yv.dtype) + ", " + show(av.dtype) + ", " +
         show(bv.dtype) + "), accepted is one of float32, bfloat16 and float16 for all four");
  if (xr.cols != ar.cols) fail("x: has " + std::to_string(xr.cols) + " features, pool_a has " + std::to_string(ar.cols));
  if (yr.cols != br.cols) fail("out: has " + std::to_string(yr.cols) + " features, pool_b has " + std::to_string(br.cols));
  if (xr.rows != yr.rows) fail("x, out: shapes " + show(xv) + " and " + show(yv) + " have different numbers of rows");
  if (ar.rows != br.rows) fail("pool_a, pool_b: " + std::to_string(ar.rows) + " and " + std::to_string(br.rows) + " rows");

  const TensorView rank = host(slot_rank, "slot_rank"), scaling = host(slot_scaling, "slot_scaling");
  const int64_t num_slots = rank.ndim == 1 ? rank.shape[0] : 0;
  expect_vector(rank, "slot_rank", kInt32, "int32", num_slots);
  expect_vector(scaling, "slot_scaling", kFloat32, "float32", num_slots);
  if (num_slots == 0 ? ar.rows != 0 : ar.rows % num_slots != 0)
    fail("pool_a: " + std::to_string(ar.rows) + " rows are no multiple of " + std::to_string(num_slots) + " slots");
  const int64_t max_rank64 = num_slots ? ar.rows / num_slots : 0;
  if (max_rank64 > kStackWorkspace)
    fail("pool_a: " + std::to_string(max_rank64) + " ranks a slot, accepted are at most " + std::to_string(kStackWorkspace));
  const int max_rank = int(max_rank64);

  const TensorView rv = host(rows, "rows"), sv = host(segment_starts, "segment_starts");
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
    expect_vector(starts, "row_starts", kInt32, "int32", xr.rows + 1);
    expect_vector(pairs, "row_pairs", kInt32, "int32", num_pairs);
    routing.row_starts = reinterpret_cast<int32_t*>(starts.data);
    routing.row_pairs = reinterpret_cast<int32_t*>(pairs.data);
  }
  const auto* const ranks = reinterpret_cast<int32_t*>(rank.data);
  check_routing(routing, xr.rows, ranks, max_rank);
  const Extent y_extent = extent(yv, yr);
  if (overlap(y_extent, extent(xv, xr))) fail("x, out: share memory");
  if (overlap(y_extent, extent(av, ar)) || overlap(y_extent, extent(bv, br))) fail("out: shares memory with a pool");

  float* scratch = nullptr;
  if (!workspace.is_none()) {
    const TensorView w = host(workspace, "workspace");
    expect_vector(w, "workspace", kFloat32, "float32", num_pairs * max_rank);
    scratch = reinterpret_cast<float*>(w.data);
  } else if (routing.row_starts && num_pairs * max_rank > kStackWorkspace) {
    fail("workspace: rows with several pairs need one of " + std::to_string(num_pairs * max_rank) + " floats");
  }

  const KernelTable& k = kernels();
  const auto* const scale = reinterpret_cast<float*>(scaling.data);
  if (same(xv.dtype, kFloat32))
    run(k.multi_lora_f32, xv, xr, yv, yr, av, ar, bv, br, ranks, scale, max_rank, routing, scratch, threads);
  else if (same(xv.dtype, kBfloat16))
    run(k.multi_lora_bf16, xv, xr, yv, yr, av, ar, bv, br, ranks, scale, max_rank, routing, scratch, threads);
  else
    run(k.multi_lora_fp16, xv, xr, yv, yr, av, ar, bv, br, ranks, scale, max_rank, routing, scratch, threads);
  return true;
}

// capsule: torch.Tensor.__dlpack_c_exchange_api__, or None to read tensors through their attributes.
bool use_exchange_api(py::object capsule) {
  exchange_api = nullptr;
  if (capsule.is_none()) return false;
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!header) throw py::error_already_set();
  while (header && header->version.major != dlpack::kMajorVersion) header = header->prev;
  auto* api = reinterpret_cast<dlpack::ExchangeApi*>(header);
  if (api && api->tensor_from_py_object) exchange_api = api;
  return exchange_api != nullptr;
}

}  // namespace
}  // namespace lora_fuse

PYBIND11_MODULE(_cpu, m) {
  using namespace lora_fuse;
  m.doc() = "CPU kernels of lora_fuse.";
  const char* isa = std::getenv("LORA_FUSE_ISA");
  choose_isa(isa ? isa : "");
  m.def("multi_lora", &multi_lora);
  m.def("use_exchange_api", &use_exchange_api);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("choose_isa", &choose_isa);
  m.attr("STACK_WORKSPACE") = kStackWorkspace;
}
