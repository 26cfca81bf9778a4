// Slots of sparse matrices and their products, from Python: validated views that own their tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "bind.h"
#include "bind_routing.h"
#include "dispatch.h"
#include "eager.h"
#include "sparse_views.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

// One slot of a pool, packed. Never changes, so forwards may read it while others are made.
struct Slot {
  py::object values, gaps, starts, order, bias;  // values: None for a slot that is only a bias
  PackedSparse view{};
  int64_t in_features, out_features;
  dlpack::DataType dtype{};

  Slot(int64_t in, int64_t out, py::object values_, py::object gaps_, py::object starts_, py::object order_, py::object bias_)
      : values(std::move(values_)), gaps(std::move(gaps_)), starts(std::move(starts_)), order(std::move(order_)),
        bias(std::move(bias_)), in_features(in), out_features(out) {
    if (in < 0 || out < 0 || in >= INT32_MAX || out > INT32_MAX) fail("in_features, out_features: out of range");
    if (!bias.is_none()) {
      const TensorView b = host(bias, "bias");
      expect_vector(b, "bias", kFloat32, "float32", out);
      view.bias = reinterpret_cast<const float*>(b.data);
    }
    if (values.is_none()) return;
    const int64_t slices = num_slices(out);
    const TensorView ov = host(order, "order"), vv = host(values, "values"), gv = host(gaps, "gaps");
    expect_vector(ov, "order", kUInt8, "uint8", slices * kLanes);
    view.order = reinterpret_cast<const uint8_t*>(ov.data);
    const int64_t total = length_of(vv);
    expect_vector(vv, "values", vv.dtype, "floating", total);
    view.starts = slice_starts(starts, out, total);
    dtype = vv.dtype;
    view.wide = wide_gaps(gv, "gaps", total);
    check_order(slices);
    if (view.wide) check_gaps(reinterpret_cast<const uint16_t*>(gv.data), slices);
    else check_gaps(reinterpret_cast<const uint8_t*>(gv.data), slices);
    view.values = vv.data ? vv.data : static_cast<const void*>(&view);  // no entries at all: not an empty slot
    view.gaps = gv.data;
  }

  // No lane runs beyond the last column, or beyond the zero after it: that is where a layer without inputs looks.
  template <class G>
  void check_gaps(const G* gaps, int64_t slices) const {
    for (int64_t s = 0; s < slices; ++s) {
      int64_t column[kLanes] = {};
      for (int64_t k = view.starts[s]; k < view.starts[s + 1]; ++k)
        for (int l = 0; l < kLanes; ++l) column[l] += gaps[k * kLanes + l];
      for (int l = 0; l < kLanes; ++l)
        if (column[l] > std::max<int64_t>(in_features - 1, 0))
          fail("gaps: of lane " + std::to_string(l) + " of slice " + std::to_string(s) + " reach column " + std::to_string(column[l]) +
               ", accepted are columns up to " + std::to_string(in_features - 1));
    }
  }

  void check_order(int64_t slices) const {  // every output of every strip once
    const int per_strip = kStrip / kLanes;
    for (int64_t strip = 0; strip * kStrip < out_features; ++strip) {
      uint64_t seen = 0;
      const int64_t stop = std::min((strip + 1) * per_strip, slices) * kLanes;
      int64_t lanes = 0;
      for (int64_t k = strip * per_strip * kLanes; k < stop; ++k)
        if (view.order[k] < kStrip) seen |= uint64_t(1) << view.order[k], ++lanes;
        else if (view.order[k] > kStrip) lanes = -kStrip;
      const int64_t width = std::min<int64_t>(kStrip, out_features - strip * kStrip);
      if (lanes != width || seen != (width == kStrip ? ~uint64_t(0) : (uint64_t(1) << width) - 1))
        fail("order: expected every output of strip " + std::to_string(strip) + " once");
    }
  }
};

// The slots of a pool.
struct Slots {
  std::vector<py::object> owners;
  std::vector<PackedSparse> views;
  std::vector<dlpack::DataType> dtypes;
  int64_t in_features, out_features;

  Slots(int64_t in, int64_t out, const py::sequence& slots) : in_features(in), out_features(out) {
    for (const py::handle s : slots) {
      owners.push_back(py::reinterpret_borrow<py::object>(s));
      views.emplace_back();
      dtypes.push_back({});
      if (s.is_none()) continue;
      const Slot& slot = py::cast<const Slot&>(s);
      if (slot.in_features != in || slot.out_features != out) fail("slots: a slot has other sizes than the pool");
      views.back() = slot.view;
      dtypes.back() = slot.dtype;
    }
  }
};

template <class T>
void run(void (*kernel)(const SparseDelta<T>&), const TensorView& x, const Rows& xr, const TensorView& y, const Rows& yr,
         const Slots& slots, const RoutingView& routing, int threads) {
  int64_t most = 0, work = 0;
  for (int s = 0; s < routing.num_slots; ++s) {
    const int64_t pairs = routing.starts[s + 1] - routing.starts[s];
    if (!pairs) continue;
    most = std::max(most, pairs);
    work += yr.cols * pairs;
    if (slots.views[s].values) work += slots.views[s].starts[num_slices(yr.cols)] * kLanes * pairs;
  }
  const int64_t each = sparse_scratch(xr.cols, most);
  threads = std::max(threads, 1);
  const std::unique_ptr<float[]> scratch(new float[each * threads]);
  const std::unique_ptr<float[]> totals(routing.row_starts ? new float[xr.rows * yr.cols]() : nullptr);
  const SparseDelta<T> call{{reinterpret_cast<const T*>(x.data), xr.rows, xr.cols, xr.stride},
                            {reinterpret_cast<T*>(y.data), yr.rows, yr.cols, yr.stride},
                            slots.views.data(), routing, scratch.get(), each, totals.get(), threads};
  if (work < kReleaseGil) return kernel(call);
  py::gil_scoped_release nogil;
  kernel(call);
}

// out[row] += weight * (U x[row] + bias) for the routing's pairs. False, and nothing done, if this is not for us: another
// device, a dtype without a kernel, or an x that has no [rows, cols] view.
bool sparse_delta_linear(py::handle out, py::handle x, const Slots& slots, const py::tuple& route, int threads) {
  const TensorView xv = view(x, "x");
  Rows xr, yr;
  if (!xv.on_cpu || !has_kernel(xv.dtype) || !collapse(xv, &xr)) return false;
  expect_memory(xv, "x");
  const TensorView yv = host(out, "out");
  if (!collapse(yv, &yr) || (yr.rows > 1 && yr.stride < yr.cols))
    fail("out: expected unit stride in the last dimension and one stride between rows, got shape " + show(yv));
  if (!same(xv.dtype, yv.dtype))
    fail("x, out: dtypes " + show(xv.dtype) + " and " + show(yv.dtype) + ", accepted is one for both");
  if (xr.cols != slots.in_features) fail("x: has " + std::to_string(xr.cols) + " features, the pool has " + std::to_string(slots.in_features));
  if (yr.cols != slots.out_features) fail("out: has " + std::to_string(yr.cols) + " features, the pool has " + std::to_string(slots.out_features));
  if (xr.rows != yr.rows) fail("x, out: shapes " + show(xv) + " and " + show(yv) + " have different numbers of rows");
  const RoutingView routing = read_routing(route, int64_t(slots.views.size()), xr.rows);
  for (int s = 0; s < routing.num_slots; ++s)
    if (routing.starts[s] < routing.starts[s + 1] && slots.views[s].values && !same(slots.dtypes[s], xv.dtype))
      fail("x: dtype " + show(xv.dtype) + ", slot " + std::to_string(s) + " of the pool holds " + show(slots.dtypes[s]));
  if (overlap(extent(yv, yr), extent(xv, xr))) fail("x, out: share memory");
  const SparseKernels& k = kernels().sparse;
  if (same(xv.dtype, kFloat32)) run(k.delta_f32, xv, xr, yv, yr, slots, routing, threads);
  else if (same(xv.dtype, kBfloat16)) run(k.delta_bf16, xv, xr, yv, yr, slots, routing, threads);
  else run(k.delta_fp16, xv, xr, yv, yr, slots, routing, threads);
  return true;
}

struct Names {
  PyObject *tensors, *weights;
} names{};

py::object get(py::handle object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// The same without torch's dispatcher, with the version bump that torch would make. False, and nothing done, where the
// dispatcher has a part to play, where the kernel would decline and where the rows are not the routing's.
bool sparse_delta_linear_eager(py::handle out, py::handle x, const Slots& slots, py::handle routing) {
  if (!may_bypass(x, out, get(routing, names.weights), false)) return false;
  TensorView v;
  if (!try_view(x, &v) || !has_rows_of(v, routing)) return false;
  const py::object route = get(routing, names.tensors);
  if (!PyTuple_Check(route.ptr())) fail("routing: expected 5 tensors");
  if (!sparse_delta_linear(out, x, slots, py::reinterpret_borrow<py::tuple>(route), num_threads())) return false;
  bump_version(out);
  return true;
}

}  // namespace

void bind_sparse(py::module_& m) {
  const auto name = [](const char* n) { return PyUnicode_InternFromString(n); };
  names = {name("tensors"), name("weights")};
  py::class_<Slot>(m, "SparseSlot").def(py::init<int64_t, int64_t, py::object, py::object, py::object, py::object, py::object>());
  py::class_<Slots>(m, "SparseSlots").def(py::init<int64_t, int64_t, const py::sequence&>());
  m.def("sparse_delta_linear", &sparse_delta_linear);
  m.def("sparse_delta_linear_eager", &sparse_delta_linear_eager);
  m.attr("SPARSE_LANES") = kLanes;
  m.attr("SPARSE_STRIP") = kStrip;
}

}  // namespace lora_fuse
