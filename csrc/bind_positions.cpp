// The positions of sparse matrices from Python: checked once, packed for the kernels, written through.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bind.h"
#include "dispatch.h"
#include "eager.h"
#include "sparse_views.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

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

}  // namespace

void bind_positions(py::module_& m) {
  py::class_<Positions>(m, "SparsePositions")
      .def(py::init<py::object, py::object, py::object, int64_t>())
      .def("column_index", &Positions::column_index)
      .def("order", &Positions::order)
      .def("pack", &Positions::pack);
  m.def("sparse_write", &sparse_write);
}

}  // namespace lora_fuse
