// Sparse matrices from Python: validated views that own their tensors, so that a call checks nothing twice.
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
#include "tensors.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

int64_t length_of(const TensorView& v) { return v.ndim == 1 ? v.shape[0] : 0; }

// A contiguous int64 tensor of count + 1 numbers that rise from 0.
const int64_t* rising(py::handle t, const char* name, int64_t count) {
  const TensorView v = host(t, name);
  expect_vector(v, name, kInt64, "int64", count + 1);
  const auto* const starts = reinterpret_cast<const int64_t*>(v.data);
  bool rises = starts[0] == 0;
  for (int64_t i = 0; i < count; ++i) rises &= starts[i] <= starts[i + 1];
  if (!rises) fail(std::string(name) + ": must rise from 0");
  return starts;
}

// Where each slice starts, in steps, for `entries` in all.
const int64_t* slice_starts(py::handle t, int64_t outputs, int64_t entries) {
  const int64_t slices = num_slices(outputs);
  const int64_t* const starts = rising(t, "starts", slices);
  if (entries % kLanes || starts[slices] != entries / kLanes) fail("starts: does not end at the number of steps");
  return starts;
}

// uint16 or int32, contiguous.
bool wide_columns(const TensorView& v, const char* name, int64_t length) {
  const bool wide = same(v.dtype, kInt32);
  expect_vector(v, name, wide ? kInt32 : kUInt16, "uint16 or int32", length);
  return wide;
}

// uint16 or uint8, contiguous.
bool wide_gaps(const TensorView& v, const char* name, int64_t length) {
  const bool wide = same(v.dtype, kUInt16);
  expect_vector(v, name, wide ? kUInt16 : kUInt8, "uint8 or uint16", length);
  return wide;
}

// The positions of a SparseMatrix, checked once.
struct Positions {
  py::object row_starts, columns, bitmap;
  SparseView at{};
  int64_t nnz = 0;

  Positions(py::object row_starts_, py::object columns_, py::object bitmap_, int64_t num_cols)
      : row_starts(std::move(row_starts_)), columns(std::move(columns_)), bitmap(std::move(bitmap_)) {
    const int64_t rows = length_of(host(row_starts, "row_starts")) - 1;
    if (rows < 0) fail("row_starts: expected an element for each row and one more");
    if (num_cols < 0 || num_cols > INT32_MAX) fail("num_cols: got " + std::to_string(num_cols) + ", accepted are 0 to 2**31 - 1");
    at.starts = rising(row_starts, "row_starts", rows);
    at.rows = rows, at.cols = num_cols;
    nnz = at.starts[rows];
    if (columns.is_none() == bitmap.is_none()) fail("columns, bitmap: expected one of them");
    if (bitmap.is_none()) {
      const TensorView cv = host(columns, "columns");
      at.wide = wide_columns(cv, "columns", nnz);
      at.columns = cv.data;
      if (at.wide) check_columns(static_cast<const int32_t*>(at.columns));
      else check_columns(static_cast<const uint16_t*>(at.columns));
    } else {
      const TensorView bv = host(bitmap, "bitmap");
      at.bitmap_stride = (num_cols + 63) / 64 * 8;
      if (bv.ndim != 2 || !same(bv.dtype, kUInt8) || bv.shape[0] != rows || bv.shape[1] != at.bitmap_stride || !is_contiguous(bv))
        fail("bitmap: expected a contiguous uint8 tensor of shape [" + std::to_string(rows) + ", " +
             std::to_string(at.bitmap_stride) + "], got shape " + show(bv));
      at.bitmap = reinterpret_cast<const uint8_t*>(bv.data);
      check_bitmap();
    }
  }

  template <class C>
  void check_columns(const C* columns) const {
    uint32_t worst = 0;  // as unsigned, a negative value is the largest
    for (int64_t i = 0; i < nnz; ++i) worst = std::max(worst, uint32_t(columns[i]));
    if (nnz > 0 && int64_t(worst) >= at.cols)
      fail("columns: value " + std::to_string(int32_t(worst)) + " is out of range, accepted are 0 to " + std::to_string(at.cols - 1));
    for (int64_t r = 0; r < at.rows; ++r) {
      bool rises = true;
      for (int64_t i = at.starts[r] + 1; i < at.starts[r + 1]; ++i) rises &= columns[i - 1] < columns[i];
      if (!rises) fail("columns: do not rise within row " + std::to_string(r));
    }
  }

  void check_bitmap() const {
    for (int64_t r = 0; r < at.rows; ++r) {
      int64_t kept = 0;
      uint64_t last = 0;
      words_of(r, [&](int64_t, uint64_t word) { kept += __builtin_popcountll(word), last = word; });
      const bool beyond = at.cols % 64 && last >> at.cols % 64;
      if (beyond || kept != at.starts[r + 1] - at.starts[r]) fail("bitmap: does not agree with row_starts");
    }
  }

  // weight[kept] = values, the previous entries to saved first; either may be None.
  SparseWrite write(py::handle weight, py::handle values, py::handle saved) const {
    const TensorView wv = host(weight, "weight");
    if (wv.ndim != 2 || wv.shape[0] != at.rows || wv.shape[1] != at.cols || !is_contiguous(wv))
      fail("weight: expected a contiguous tensor of shape [" + std::to_string(at.rows) + ", " + std::to_string(at.cols) +
           "], got shape " + show(wv));
    const int size = wv.dtype.bits / 8;
    if (size != 2 && size != 4 && size != 8) fail("weight: accepted are elements of 2, 4 and 8 bytes");
    const auto entries = [&](py::handle t, const char* name) -> char* {
      if (t.is_none()) return nullptr;
      const TensorView v = host(t, name);
      expect_vector(v, name, wv.dtype, "(weight's dtype)", nnz);
      return v.data;
    };
    return {at, wv.data, entries(saved, "saved"), entries(values, "values"), size};
  }

  // f(index of the entry, column) for every entry of a row.
  template <class F>
  void entries_of(int64_t row, const F& f) const {
    int64_t i = at.starts[row];
    if (at.columns) {
      for (; i < at.starts[row + 1]; ++i)
        f(i, at.wide ? static_cast<const int32_t*>(at.columns)[i] : int32_t(static_cast<const uint16_t*>(at.columns)[i]));
      return;
    }
    words_of(row, [&](int64_t first, uint64_t word) {
      for (; word; word &= word - 1, ++i) f(i, int32_t(first + __builtin_ctzll(word)));
    });
  }

  // f(column of the lowest bit, 64 bits) along a row of a bitmap.
  template <class F>
  void words_of(int64_t row, const F& f) const {
    const uint8_t* const bits = at.bitmap + row * at.bitmap_stride;
    for (int64_t b = 0; b < at.bitmap_stride; b += 8) {
      uint64_t word;
      std::memcpy(&word, bits + b, 8);
      f(b * 8, word);
    }
  }

  void column_index(py::handle out) const {  // [nnz] int64
    const TensorView v = host(out, "out");
    expect_vector(v, "out", kInt64, "int64", nnz);
    auto* const c = reinterpret_cast<int64_t*>(v.data);
    for (int64_t r = 0; r < at.rows; ++r) entries_of(r, [&](int64_t i, int32_t column) { c[i] = column; });
  }

  // Which output each lane holds, and where each slice starts, in steps; the steps in all. wide: gaps of 16 bits, else 8.
  int64_t order(py::handle starts, py::handle order, bool wide) const {
    const int64_t slices = num_slices(at.rows);
    const TensorView sv = host(starts, "starts"), ov = host(order, "order");
    expect_vector(sv, "starts", kInt64, "int64", slices + 1);
    expect_vector(ov, "order", kUInt8, "uint8", slices * kLanes);
    auto* const first = reinterpret_cast<int64_t*>(sv.data);
    auto* lane = reinterpret_cast<uint8_t*>(ov.data);
    int64_t slice = 0;
    first[0] = 0;
    for (int64_t o = 0; o < at.rows; o += kStrip) {
      const int width = int(std::min<int64_t>(kStrip, at.rows - o)), lanes = (width + kLanes - 1) / kLanes * kLanes;
      int64_t length[kStrip] = {};
      for (int k = 0; k < width; ++k) length[k] = at.starts[o + k + 1] - at.starts[o + k] + fillers(o + k, widest_gap(wide));
      for (int k = 0; k < lanes; ++k) lane[k] = uint8_t(k < width ? k : kStrip);
      std::stable_sort(lane, lane + width, [&](int a, int b) { return length[a] > length[b]; });
      for (int k = 0; k < lanes; k += kLanes, ++slice) first[slice + 1] = first[slice] + length[lane[k]];
      lane += lanes;
    }
    return first[slices];
  }

  static int64_t fillers_of(int64_t gap, int64_t widest) { return gap > widest ? (gap - 1) / widest : 0; }

  // All fillers of a row.
  int64_t fillers(int64_t row, int64_t widest) const {
    if (at.cols - 1 <= widest) return 0;
    int64_t count = 0, last = 0;
    if (at.columns)
      entries_of(row, [&](int64_t, int32_t column) { count += fillers_of(column - last, widest), last = column; });
    else
      words_of(row, [&](int64_t first, uint64_t word) {  // gaps inside a word are short
        if (!word) return;
        count += fillers_of(first + __builtin_ctzll(word) - last, widest);
        last = first + 63 - __builtin_clzll(word);
      });
    return count;
  }

  // f(index of the entry, fillers before it, gap after them) for every entry of a row.
  template <class F>
  void placed_gaps(int64_t row, int64_t widest, const F& f) const {
    int64_t last = 0;
    entries_of(row, [&](int64_t i, int32_t column) {
      const int64_t gap = column - last, before = fillers_of(gap, widest);
      f(i, before, gap - before * widest);
      last = column;
    });
  }

  // The entries in that order.
  void pack(py::handle values, py::handle starts, py::handle order, py::handle packed_values, py::handle packed_gaps) const {
    const int64_t slices = num_slices(at.rows);
    const TensorView ov = host(order, "order"), from = host(values, "values"), to = host(packed_values, "packed_values"),
                     gv = host(packed_gaps, "packed_gaps");
    expect_vector(ov, "order", kUInt8, "uint8", slices * kLanes);
    const auto* const lane = reinterpret_cast<const uint8_t*>(ov.data);
    const int64_t total = length_of(to), *const first = slice_starts(starts, at.rows, total);
    expect_vector(from, "values", to.dtype, "(packed_values' dtype)", nnz);
    expect_vector(to, "packed_values", to.dtype, "floating", total);
    const bool wide = wide_gaps(gv, "packed_gaps", total);
    const int64_t widest = widest_gap(wide);
    const auto put = [&](auto value, auto* gaps) {
      using V = decltype(value);
      using G = std::remove_pointer_t<decltype(gaps)>;
      const V* const source = reinterpret_cast<const V*>(from.data);
      V* const target = reinterpret_cast<V*>(to.data);
      std::fill(target, target + total, V{0});
      std::fill(gaps, gaps + total, G{0});
      for (int64_t k = 0; k < slices * kLanes; ++k) {
        if (lane[k] >= kStrip) continue;
        const int64_t slice = k / kLanes, row = slice / (kStrip / kLanes) * kStrip + lane[k], end = first[slice + 1] * kLanes;
        int64_t place = first[slice] * kLanes + k % kLanes;
        if (row >= at.rows) fail("order: not this matrix's");
        placed_gaps(row, widest, [&](int64_t i, int64_t fillers, int64_t gap) {
          if (place + fillers * kLanes >= end) fail("starts, order: not this matrix's");
          for (; fillers > 0; --fillers, place += kLanes) gaps[place] = G(widest);
          target[place] = source[i], gaps[place] = G(gap);
          place += kLanes;
        });
      }
    };
    const auto put_as = [&](auto value) {
      if (wide) put(value, reinterpret_cast<uint16_t*>(gv.data));
      else put(value, reinterpret_cast<uint8_t*>(gv.data));
    };
    switch (to.dtype.bits) {
      case 16: put_as(uint16_t{}); break;
      case 32: put_as(uint32_t{}); break;
      case 64: put_as(uint64_t{}); break;
      default: fail("values: accepted are elements of 2, 4 and 8 bytes");
    }
  }
};

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

// Every (positions, weight, values, saved), all of them checked before any is written.
void sparse_write(const py::sequence& writes, int threads) {
  struct Touched {
    Extent bytes;
    bool written;
    const char* name;
  };
  std::vector<SparseWrite> calls;
  std::vector<Touched> touched;
  const auto touch = [&](const void* data, int64_t bytes, bool written, const char* name) {
    const char* const begin = static_cast<const char*>(data);
    if (begin && bytes) touched.push_back({{begin, begin + bytes}, written, name});
  };
  for (const py::handle w : writes) {
    const auto parts = py::reinterpret_borrow<py::sequence>(w);
    const Positions& positions = py::cast<const Positions&>(parts[0]);
    calls.push_back(positions.write(parts[1], parts[2], parts[3]));
    const SparseWrite& p = calls.back();
    touch(p.weight, p.at.rows * p.at.cols * p.size, true, "weight");
    touch(p.saved, positions.nnz * p.size, true, "saved");
    touch(p.values, positions.nnz * p.size, false, "values");
  }
  std::sort(touched.begin(), touched.end(), [](const Touched& a, const Touched& b) { return a.bytes.begin < b.bytes.begin; });
  Touched all{}, written{};  // of those before, the one that ends last
  for (const Touched& t : touched) {
    const Touched& before = t.written ? all : written;
    if (before.name && overlap(before.bytes, t.bytes)) fail(std::string(before.name) + ", " + t.name + ": share memory");
    if (!all.name || t.bytes.end > all.bytes.end) all = t;
    if (t.written && (!written.name || t.bytes.end > written.bytes.end)) written = t;
  }
  {
    py::gil_scoped_release nogil;
    kernels().sparse.write(calls.data(), int64_t(calls.size()), threads);
  }
  for (const py::handle w : writes) {
    const auto parts = py::reinterpret_borrow<py::sequence>(w);
    if (!py::object(parts[2]).is_none()) bump_version(py::object(parts[1]));
    if (!py::object(parts[3]).is_none()) bump_version(py::object(parts[3]));
  }
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
  py::class_<Positions>(m, "SparsePositions")
      .def(py::init<py::object, py::object, py::object, int64_t>())
      .def("column_index", &Positions::column_index)
      .def("order", &Positions::order)
      .def("pack", &Positions::pack);
  py::class_<Slot>(m, "SparseSlot").def(py::init<int64_t, int64_t, py::object, py::object, py::object, py::object, py::object>());
  py::class_<Slots>(m, "SparseSlots").def(py::init<int64_t, int64_t, const py::sequence&>());
  m.def("sparse_write", &sparse_write);
  m.def("sparse_delta_linear", &sparse_delta_linear);
  m.def("sparse_delta_linear_eager", &sparse_delta_linear_eager);
  m.attr("SPARSE_LANES") = kLanes;
  m.attr("SPARSE_STRIP") = kStrip;
}

}  // namespace lora_fuse
