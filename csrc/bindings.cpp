// The Python side of the kernels: checks, GIL release. No arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "bind.h"
#include "bind_routing.h"
#include "dispatch.h"
#include "eager.h"
#include "launches.h"
#include "routing.h"
#include "tensors.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

void check_ranks(const int32_t* slot_rank, int64_t num_slots, int max_rank) {
  for (int64_t s = 0; s < num_slots; ++s)
    if (slot_rank[s] < 0 || slot_rank[s] > max_rank)
      fail("slot_rank: slot " + std::to_string(s) + " has rank " + std::to_string(slot_rank[s]) + ", accepted are 0 to " + std::to_string(max_rank));
}

// A call whose tensors fit together, without its type.
struct Checked {
  TensorView x, y, a, b;
  Rows xr, yr, ar, br;
  const int32_t* ranks;
  const float* scaling;
  int max_rank;
  RoutingView routing;
};

template <class T>
void run(void (*kernel)(const MultiLora<T>*, int), const Checked* checked, int n, float* workspace, int threads) {
  MultiLora<T> calls[kMaxSlices];
  int64_t work = 0;
  for (int i = 0; i < n; ++i) {
    const Checked& c = checked[i];
    calls[i] = {{reinterpret_cast<const T*>(c.x.data), c.xr.rows, c.xr.cols, c.xr.stride},
                {reinterpret_cast<T*>(c.y.data), c.yr.rows, c.yr.cols, c.yr.stride},
                {reinterpret_cast<const T*>(c.a.data), c.ar.rows, c.ar.cols, c.ar.stride},
                {reinterpret_cast<const T*>(c.b.data), c.br.rows, c.br.cols, c.br.stride},
                c.ranks, c.scaling, c.max_rank, c.routing, workspace, threads};
    work += int64_t(c.routing.num_pairs) * c.max_rank * (c.xr.cols + c.yr.cols);
  }
  if (work < kReleaseGil) return kernel(calls, n);
  py::gil_scoped_release nogil;
  kernel(calls, n);
}

// Whether the kernels take this x at all: not on another device, nor of a dtype without a kernel, nor without a
// [rows, cols] view.
bool takes(const TensorView& xv, Rows* xr) {
  if (!xv.on_cpu || !has_kernel(xv.dtype) || !collapse(xv, xr)) return false;
  expect_memory(xv, "x");
  return true;
}

// pool: (pool_a, pool_b, slot_rank, slot_scaling). route: read if there is no `routing` yet.
Checked check(const TensorView& xv, const Rows& xr, const TensorView& yv, const py::tuple& pool, const py::tuple& route,
              const RoutingView* routing) {
  if (pool.size() != 4) fail("pool: expected 4 tensors");
  const auto at = [&](int i) { return py::handle(PyTuple_GET_ITEM(pool.ptr(), i)); };
  Rows yr, ar, br;
  const TensorView av = host(at(0), "pool_a"), bv = host(at(1), "pool_b");
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

  const TensorView rank = host(at(2), "slot_rank"), scaling = host(at(3), "slot_scaling");
  const int64_t num_slots = rank.ndim == 1 ? rank.shape[0] : 0;
  expect_vector(rank, "slot_rank", kInt32, "int32", num_slots);
  expect_vector(scaling, "slot_scaling", kFloat32, "float32", num_slots);
  if (num_slots == 0 ? ar.rows != 0 : ar.rows % num_slots != 0)
    fail("pool_a: " + std::to_string(ar.rows) + " rows are no multiple of " + std::to_string(num_slots) + " slots");
  const int64_t max_rank = num_slots ? ar.rows / num_slots : 0;
  if (max_rank > kStackWorkspace)
    fail("pool_a: " + std::to_string(max_rank) + " ranks a slot, accepted are at most " + std::to_string(kStackWorkspace));

  const auto* const ranks = reinterpret_cast<int32_t*>(rank.data);
  check_ranks(ranks, num_slots, int(max_rank));
  const bool read = routing && routing->num_slots == num_slots;
  const Extent y_extent = extent(yv, yr);
  const Checked checked{xv, yv, av, bv, xr, yr, ar, br, ranks, reinterpret_cast<float*>(scaling.data), int(max_rank),
                        read ? *routing : read_routing(route, num_slots, xr.rows)};
  if (overlap(y_extent, extent(xv, xr))) fail("x, out: share memory");
  if (overlap(y_extent, extent(av, ar)) || overlap(y_extent, extent(bv, br))) fail("out: shares memory with a pool");
  return checked;
}

void run_all(const Checked* checked, int n, int threads) {
  std::unique_ptr<float[]> room;  // the intermediate of a whole batch, which rows with several pairs need at once
  int64_t most = 0;
  for (int i = 0; i < n; ++i)
    if (checked[i].routing.row_starts) most = std::max(most, int64_t(checked[i].routing.num_pairs) * checked[i].max_rank);
  if (most > kStackWorkspace) room.reset(new float[most]);
  const KernelTable& k = kernels();
  if (same(checked->x.dtype, kFloat32))
    run(k.multi_lora_f32, checked, n, room.get(), threads);
  else if (same(checked->x.dtype, kBfloat16))
    run(k.multi_lora_bf16, checked, n, room.get(), threads);
  else
    run(k.multi_lora_fp16, checked, n, room.get(), threads);
}

// pool: (pool_a, pool_b, slot_rank, slot_scaling); route: (rows, weights, segment_starts, row_starts, row_pairs).
// Adds into out. False, and nothing done, if this is not for us.
bool multi_lora(py::handle out, py::handle x, const py::tuple& pool, const py::tuple& route, int threads) {
  if (pool.size() != 4 || route.size() != 5) fail("pool, routing: expected 4 and 5 tensors");
  const TensorView xv = view(x, "x");
  Rows xr;
  if (!takes(xv, &xr)) return false;
  const Checked checked = check(xv, xr, host(out, "out"), pool, route, nullptr);
  run_all(&checked, 1, threads);
  return true;
}

// One of a routing's arrays, as the caller allocated it: writable, of 4-byte elements.
struct Array {
  void* data = nullptr;
  int64_t length = 0;
  Array(py::handle owner, const char* name) {
    if (owner.is_none()) return;
    Py_buffer b;
    if (PyObject_GetBuffer(owner.ptr(), &b, PyBUF_WRITABLE) != 0) throw py::error_already_set();
    data = b.buf, length = b.len / 4;
    const bool fits = b.itemsize == 4 || b.len == 0;
    PyBuffer_Release(&b);  // the caller holds the arrays
    if (!fits) fail(std::string(name) + ": expected 4-byte elements");
  }
  void expect(int64_t want, const char* name) const {
    if (length != want) fail(std::string(name) + ": expected " + std::to_string(want) + " elements, got " + std::to_string(length));
  }
};

template <class T>
T number(py::handle value, const char* what) {
  try {
    return py::cast<T>(value);
  } catch (const py::cast_error&) {
    throw py::type_error(std::string(what) + ", got " + std::string(py::repr(value)));
  }
}

// fields: NumPy arrays (rows, weights or None, segment_starts, row_starts or None, row_pairs or None), int32 but for the
// weights, float32; entries: sequences of (slot, weight).
void fill_routing_py(const py::tuple& fields, const py::sequence& entries, const py::sequence& which, int64_t outer, int64_t inner) {
  if (fields.size() != 5) fail("routing: expected 5 arrays");
  const Array rows(fields[0], "rows"), weights(fields[1], "weights"), starts(fields[2], "segment_starts"),
      row_starts(fields[3], "row_starts"), row_pairs(fields[4], "row_pairs");
  const int64_t num_slots = starts.length - 1;
  if (num_slots < 0) fail("segment_starts: expected an element for each slot and one more");
  constexpr int64_t most = INT32_MAX;
  if (outer < 0 || inner < 0 || outer > most || inner > most || outer * inner > most)
    fail("lead: expected two sizes from 0 whose product is below 2**31");
  std::vector<Entry> parsed;
  for (const py::handle entry : entries) {
    Entry pairs;
    for (const py::handle pair : py::reinterpret_borrow<py::sequence>(entry)) {
      const py::tuple two = py::cast<py::tuple>(pair);
      const auto slot = number<int64_t>(two[0], "entries: a slot is an integer");
      if (slot < 0 || slot >= num_slots)
        fail("entries: slot " + std::to_string(slot) + " is out of range, accepted are 0 to " + std::to_string(num_slots - 1));
      pairs.emplace_back(int(slot), number<float>(two[1], "entries: a weight is a number"));
    }
    std::sort(pairs.begin(), pairs.end());
    for (size_t i = 1; i < pairs.size(); ++i)
      if (pairs[i].first == pairs[i - 1].first) fail("entries: slot " + std::to_string(pairs[i].first) + " twice in one entry");
    parsed.push_back(std::move(pairs));
  }
  std::vector<int> chosen;
  int64_t num_pairs = 0;
  for (const py::handle k : which) {
    const auto index = number<int64_t>(k, "which: an index is an integer");
    if (index < 0 || index >= int64_t(parsed.size())) fail("which: entry " + std::to_string(index) + " does not exist");
    chosen.push_back(int(index));
    num_pairs += int64_t(parsed[index].size());
  }
  const int64_t per_sample = outer * inner, num_rows = int64_t(chosen.size()) * per_sample;
  num_pairs *= per_sample;
  if (num_rows > INT32_MAX || num_pairs > INT32_MAX) fail("selection: more than 2**31 - 1 rows or pairs");
  rows.expect(num_pairs, "rows");
  if (weights.data) weights.expect(num_pairs, "weights");
  if (!row_starts.data != !row_pairs.data && num_pairs) fail("row_starts, row_pairs: give both or neither");
  if (row_starts.data) row_starts.expect(num_rows + 1, "row_starts"), row_pairs.expect(num_pairs, "row_pairs");
  fill_routing({static_cast<int32_t*>(rows.data), static_cast<float*>(weights.data), static_cast<int32_t*>(starts.data),
                static_cast<int32_t*>(row_starts.data), static_cast<int32_t*>(row_pairs.data), num_pairs, num_rows, num_slots},
               parsed, chosen, outer, inner);
}

// ---- called for every layer: no Python frame, no pybind dispatch ----

struct Names {
  PyObject *cache, *tensors, *weights, *pool_a, *pool_b, *slot_rank, *slot_scaling, *slot_bias, *tiles, *device;
} names{};

// Of multi_lora and multi_lora_slices on a GPU, see launch_again; kept for good.
PyObject *ready_launches = nullptr, *ready_slices = nullptr;

py::object get(py::handle object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// The four tensors of an AdapterPool, from its buffers.
py::tuple pool_tensors(py::handle buffers) {
  const auto buffer = [&](PyObject* name) {
    const py::handle t = PyDict_Check(buffers.ptr()) ? PyDict_GetItemWithError(buffers.ptr(), name) : nullptr;
    if (!t) throw py::type_error("pool: expected the buffers of an AdapterPool");
    return t;
  };
  return py::make_tuple(buffer(names.pool_a), buffer(names.pool_b), buffer(names.slot_rank), buffer(names.slot_scaling));
}

// multi_lora's launches on a GPU, if there were ones like them before: then all was checked, since checks ask for no more
// than the key holds.
bool apply_again(py::handle y, py::handle x, const py::tuple& pool, const py::tuple& route, const py::object& tiles) {
  if (!ready_launches || pool.size() != 4 || route.size() != 5) return false;
  PyObject* operands[12] = {y.ptr(), x.ptr()};
  for (int i = 0; i < 4; ++i) operands[2 + i] = PyTuple_GET_ITEM(pool.ptr(), i);
  for (int i = 0; i < 5; ++i) operands[6 + i] = PyTuple_GET_ITEM(route.ptr(), i);
  operands[11] = tiles.ptr();
  return launch_again(ready_launches, operands, 12);
}

// multi_lora on the pool's buffers and the routing's tensors, with the version bump that torch would make.
bool apply(bool on_cpu, py::handle y, py::handle x, py::handle buffers, const py::object& routing) {
  const py::object tensors = get(routing, names.tensors);
  if (!PyTuple_Check(tensors.ptr())) fail("routing: expected 5 tensors");
  const auto route = py::reinterpret_borrow<py::tuple>(tensors);
  const py::tuple pool = pool_tensors(buffers);
  const bool done = on_cpu ? multi_lora(y, x, pool, route, num_threads()) : apply_again(y, x, pool, route, get(routing, names.tiles));
  if (done) bump_version(y);
  return done;
}

// What multi_lora does, without torch's dispatcher. False, and nothing done, where the dispatcher has a part to play,
// where multi_lora would decline and where the rows are not the routing's.
bool multi_lora_eager(py::handle out, py::handle x, py::handle buffers, py::handle routing) {
  if (!may_bypass(x, out, get(routing, names.weights), false)) return false;
  TensorView v;
  if (!try_view(x, &v) || !has_rows_of(v, routing)) return false;
  return apply(v.on_cpu, out, x, buffers, py::reinterpret_borrow<py::object>(routing));
}

// The Routing of this input in the running forward, from `cache`, a dict from the leading dimensions of a CPU input, or
// (these, device), to its Routing (None: no adapter). Null where there is none, where the dispatcher has a part to play,
// and on side streams of a GPU, whose forwards may be captured. y is nobody else's.
py::object current_routing(py::handle y, py::handle x, py::handle local, TensorView* xv, TensorView* yv) {
  const py::object cache = get(local, names.cache);
  // routings made for a forward have no weights that want a gradient
  if (!PyDict_CheckExact(cache.ptr()) || !may_bypass(x, y, py::none(), true)) return {};
  if (!try_view(x, xv) || !try_view(y, yv) || !same(xv->dtype, yv->dtype) || xv->ndim < 1) return {};
  const py::tuple lead(xv->ndim - 1);
  for (int i = 0; i + 1 < xv->ndim; ++i) PyTuple_SET_ITEM(lead.ptr(), i, PyLong_FromLongLong(xv->shape[i]));
  py::object key = lead;
  if (!xv->on_cpu) {
    if (xv->device.type != dlpack::kCUDA || !on_default_stream(xv->device.id)) return {};
    key = py::make_tuple(lead, get(x, names.device));
  }
  const py::object routing = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(cache.ptr(), key.ptr()));
  if (!routing && PyErr_Occurred()) throw py::error_already_set();
  return routing;
}

bool without_bias(py::handle buffers) {
  const py::handle bias = PyDict_Check(buffers.ptr()) ? PyDict_GetItem(buffers.ptr(), names.slot_bias) : nullptr;
  return bias && bias.is_none();
}

// One layer of a running forward. local: the thread's state, whose `cache` is None outside a forward. y: the bare layer's
// output. False, and nothing done, unless all is there and plain.
bool serve(py::handle y, py::handle x, py::handle local, py::handle buffers) {
  TensorView xv, yv;
  const py::object routing = current_routing(y, x, local, &xv, &yv);
  if (!routing) return false;
  if (routing.is_none()) return true;
  return without_bias(buffers) && apply(xv.on_cpu, y, x, buffers, routing);
}

// Layers that share x on a GPU: the launches of multi_lora_slices_, if there were ones like them before.
bool serve_slices(py::handle y, py::handle x, py::handle routing, const py::tuple& parts) {
  std::vector<py::object> starts, pools, operands{py::reinterpret_borrow<py::object>(y), py::reinterpret_borrow<py::object>(x)};
  int64_t column = 0;
  for (const py::handle part : parts) {
    const auto pair = py::cast<py::tuple>(part);
    const py::object buffers = pair[0];
    if (!buffers.is_none()) {
      if (!without_bias(buffers)) return false;
      starts.push_back(py::int_(column));
      for (const py::handle t : pool_tensors(buffers)) pools.push_back(py::reinterpret_borrow<py::object>(t));
    }
    column += py::cast<int64_t>(pair[1]);
  }
  if (starts.empty()) return true;
  if (!ready_slices) return false;
  operands.insert(operands.end(), starts.begin(), starts.end());
  operands.insert(operands.end(), pools.begin(), pools.end());
  for (const py::handle t : py::tuple(get(routing, names.tensors))) operands.push_back(py::reinterpret_borrow<py::object>(t));
  operands.push_back(get(routing, names.tiles));
  std::vector<PyObject*> raw;
  for (const py::object& operand : operands) raw.push_back(operand.ptr());
  if (!launch_again(ready_slices, raw.data(), Py_ssize_t(raw.size()))) return false;
  bump_version(y);
  return true;
}

// The same for layers that share x, whose outputs lie side by side in y. parts: (buffers of the pool or None, width) of
// each.
bool serve_packed(py::handle y, py::handle x, py::handle local, py::handle parts) {
  if (!PyTuple_Check(parts.ptr()) || PyTuple_GET_SIZE(parts.ptr()) > kMaxSlices)
    throw py::type_error("parts: expected a tuple of at most " + std::to_string(kMaxSlices) + " (buffers or None, width)");
  TensorView xv, yv;
  const py::object routing = current_routing(y, x, local, &xv, &yv);
  if (!routing) return false;
  if (routing.is_none()) return true;
  if (!xv.on_cpu) return serve_slices(y, x, routing, py::reinterpret_borrow<py::tuple>(parts));
  Rows xr;
  if (!takes(xv, &xr) || yv.ndim < 1) return false;
  const py::tuple route = get(routing, names.tensors);
  Checked checked[kMaxSlices];
  int n = 0;
  int64_t column = 0;
  for (const py::handle part : py::reinterpret_borrow<py::tuple>(parts)) {
    const auto pair = py::cast<py::tuple>(part);
    const int64_t width = PyLong_AsLongLong(py::handle(pair[1]).ptr());
    const py::handle buffers = PyTuple_GET_ITEM(pair.ptr(), 0);
    TensorView slice = yv;
    if (width < 0 || column + width > yv.shape[yv.ndim - 1]) fail("parts: wider than y");
    slice.shape[slice.ndim - 1] = width;
    slice.data += column * slice.strides[slice.ndim - 1] * (slice.dtype.bits / 8);
    column += width;
    if (buffers.is_none()) continue;
    if (!without_bias(buffers)) return false;
    checked[n] = check(xv, xr, slice, pool_tensors(buffers), route, n ? &checked[0].routing : nullptr);
    ++n;
  }
  if (n == 0) return true;
  run_all(checked, n, num_threads());
  bump_version(y);
  return true;
}

template <bool (*F)(PyObject* const*)>
PyObject* fastcall(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
  try {
    return PyBool_FromLong(F(args));
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (py::builtin_exception& e) {
    e.set_error();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

// (out, x, buffers of the pool, routing), (y, x, thread state, buffers of the pool) and (y, x, thread state, parts)
bool multi_lora_eager_args(PyObject* const* a) { return multi_lora_eager(a[0], a[1], a[2], a[3]); }
bool serve_args(PyObject* const* a) { return serve(a[0], a[1], a[2], a[3]); }
bool serve_packed_args(PyObject* const* a) { return serve_packed(a[0], a[1], a[2], a[3]); }

PyMethodDef fast_methods[] = {
    {"multi_lora_eager", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fastcall<multi_lora_eager_args>)), METH_FASTCALL, nullptr},
    {"serve", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fastcall<serve_args>)), METH_FASTCALL, nullptr},
    {"serve_packed", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fastcall<serve_packed_args>)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace lora_fuse

PYBIND11_MODULE(_cpu, m) {
  using namespace lora_fuse;
  m.doc() = "CPU kernels of lora_fuse.";
  const char* isa = std::getenv("LORA_FUSE_ISA");
  choose_isa(isa ? isa : "");
  m.def("multi_lora", &multi_lora);
  const auto name = [](const char* n) { return PyUnicode_InternFromString(n); };
  names = {name("cache"), name("tensors"), name("weights"), name("pool_a"), name("pool_b"), name("slot_rank"), name("slot_scaling"), name("slot_bias"), name("tiles"), name("device")};
  if (PyModule_AddFunctions(m.ptr(), fast_methods) != 0) throw py::error_already_set();
  m.def("fill_routing", &fill_routing_py);
  m.def("may_bypass", [](py::handle x, py::handle weights) { return may_bypass(x, py::none(), weights, false); });
  m.def("set_eager_queries", &set_eager_queries);
  m.def("use_exchange_api", &use_exchange_api);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("choose_isa", &choose_isa);
  const auto set_ready = [](py::dict ready, py::object slices) {
    ready_launches = ready.release().ptr();
    ready_slices = slices.is_none() ? nullptr : slices.release().ptr();
  };
  m.def("set_ready_launches", set_ready, py::arg("ready"), py::arg("slices") = py::none());
  bind_launches(m);
  bind_normals(m);
  bind_topk(m);
  bind_positions(m);
  bind_sparse(m);
  m.attr("STACK_WORKSPACE") = kStackWorkspace;
}
