// Tensors in, tensors out, for csrc/topk.cpp: checks and GIL release. No arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>

#include "bind.h"
#include "eager.h"
#include "tensors.h"
#include "topk.h"

namespace py = pybind11;

namespace lora_fuse {
namespace {

std::string indexed(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

int dtype_index(dlpack::DataType t) { return same(t, kFloat32) ? 0 : same(t, kBfloat16) ? 1 : same(t, kFloat16) ? 2 : -1; }

// A contiguous CPU tensor of so many elements.
char* contiguous(py::handle t, const std::string& name, dlpack::DataType dtype, int64_t elements) {
  const TensorView v = host(t, name.c_str());
  if (!same(v.dtype, dtype) || count_of(v) != elements || !is_contiguous(v))
    fail(name + ": expected a contiguous tensor of " + std::to_string(elements) + " " + show(dtype) + ", got " + show(v.dtype) +
         " of shape " + show(v));
  return v.data;
}

// Fresh memory of some size comes in large pages if the system lets us ask.
void advise_huge(char* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1), end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

class PySelection {
 public:
  // xs, minus: contiguous tensors; minus may be None. ks: as Selection's.
  PySelection(const py::list& xs, const py::object& minus, const py::list& shapes, const std::string& scope, const std::vector<int64_t>& ks)
      : tensors_(py::make_tuple(py::tuple(xs), minus.is_none() ? minus : py::object(py::tuple(minus)))) {
    std::vector<TopkInput> inputs;
    if (shapes.size() != xs.size()) fail("shapes: expected one for each tensor");
    const bool global = scope == "global";
    if (!global && scope != "row" && scope != "tensor") fail("scope: expected tensor, row or global, got '" + scope + "'");
    if (ks.size() != (global ? 1 : xs.size())) fail("ks: wrong length");
    const py::tuple subtracted = minus.is_none() ? py::tuple(0) : py::tuple(minus);
    if (!minus.is_none() && subtracted.size() != xs.size()) fail("minus: expected a tensor for each of x");
    int64_t total = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const TensorView v = host(xs[i], indexed("x", i).c_str());
      const auto [rows, cols] = py::cast<std::pair<int64_t, int64_t>>(shapes[i]);
      const int64_t n = count_of(v);
      const int dtype = dtype_index(v.dtype);
      if (rows < 0 || cols < 0 || rows * cols != n || dtype < 0) fail(indexed("x", i) + ": wrong shape or dtype");
      char* const x = contiguous(xs[i], indexed("x", i), v.dtype, n);
      char* const m = minus.is_none() ? nullptr : contiguous(subtracted[i], indexed("minus", i), v.dtype, n);
      inputs.push_back({x, m, rows, cols, dtype, v.dtype.bits / 8});
      if (!global && (ks[i] < 0 || ks[i] > (scope == "row" ? cols : n))) fail("ks: out of range");
      total += n;
    }
    if (global && (ks[0] < 0 || ks[0] > total)) fail("ks: out of range");
    const TopkScope s = global ? TopkScope::global : scope == "row" ? TopkScope::row : TopkScope::tensor;
    py::gil_scoped_release nogil;
    selection_ = std::make_unique<Selection>(std::move(inputs), s, ks);
  }

  int select(int threads, bool histogram) {
    py::gil_scoped_release nogil;
    selection_->select(threads, histogram ? TopkMethod::histogram : TopkMethod::bracket);
    return selection_->bad_input();
  }

  const std::vector<int64_t>& kept() const { return selection_->kept(); }

  void write_mask(const py::list& out, int threads) const {
    std::vector<uint8_t*> data;
    for (char* p : outputs(out, true)) data.push_back(reinterpret_cast<uint8_t*>(p));
    py::gil_scoped_release nogil;
    selection_->write_mask(data, threads);
  }

  void write_dense(const py::list& out, bool fresh, int threads) const {
    const std::vector<char*> data = outputs(out, false);
    if (!fresh) refuse_overlaps(data);
    {
      py::gil_scoped_release nogil;
      if (fresh)
        for (size_t i = 0; i < data.size(); ++i) advise_huge(data[i], bytes(i));
      selection_->write_dense(data, threads);
    }
    if (!fresh)
      for (const py::handle t : out) bump_version(t);
  }

  // out: a (values, row_starts, columns or None, bitmap or None) for each tensor.
  void write_sparse(const py::list& out, bool own, int threads) const {
    const auto& inputs = selection_->inputs();
    if (out.size() != inputs.size()) fail("out: expected one for each of x");
    std::vector<SparseOutput> outputs;
    for (size_t i = 0; i < out.size(); ++i) {
      const TopkInput& in = inputs[i];
      const auto t = py::cast<py::tuple>(out[i]);
      if (t.size() != 4) fail("out: expected values, row_starts, columns and bitmap");
      const int64_t kept = selection_->kept()[i];
      SparseOutput o{};
      o.values = contiguous(t[0], indexed("values", i), dtype_of(in), kept);
      o.row_starts = reinterpret_cast<int64_t*>(contiguous(t[1], indexed("row_starts", i), kInt64, in.rows + 1));
      o.wide = in.cols > (1 << 16);
      if (py::object(t[2]).is_none() == py::object(t[3]).is_none()) fail("out: expected either columns or a bitmap");
      if (in.cols > INT32_MAX) fail(indexed("x", i) + ": more than 2**31 - 1 columns");
      if (!py::object(t[2]).is_none()) o.columns = contiguous(t[2], indexed("columns", i), o.wide ? kInt32 : kUInt16, kept);
      else o.bitmap = reinterpret_cast<uint64_t*>(contiguous(t[3], indexed("bitmap", i), kUInt8, in.rows * ((in.cols + 63) / 64) * 8));
      outputs.push_back(o);
    }
    py::gil_scoped_release nogil;
    selection_->write_sparse(outputs, own, threads);
  }

 private:
  static dlpack::DataType dtype_of(const TopkInput& in) { return in.dtype == 0 ? kFloat32 : in.dtype == 1 ? kBfloat16 : kFloat16; }
  int64_t bytes(size_t i) const {
    const TopkInput& in = selection_->inputs()[i];
    return in.rows * in.cols * in.itemsize;
  }

  std::vector<char*> outputs(const py::list& out, bool mask) const {
    const auto& inputs = selection_->inputs();
    if (out.size() != inputs.size()) fail("out: expected one for each of x");
    std::vector<char*> data;
    for (size_t i = 0; i < out.size(); ++i)
      data.push_back(contiguous(out[i], indexed("out", i), mask ? kBool : dtype_of(inputs[i]), inputs[i].rows * inputs[i].cols));
    return data;
  }

  // An output may be its own x or minus, entry for entry; any other shared memory would be read after it is written.
  void refuse_overlaps(const std::vector<char*>& out) const {
    struct Piece {
      const char *begin, *end;
      size_t input;
      bool written;
    };
    std::vector<Piece> pieces;
    const auto& inputs = selection_->inputs();
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t n = bytes(i);
      if (n == 0) continue;
      pieces.push_back({out[i], out[i] + n, i, true});
      for (const char* read : {inputs[i].x, inputs[i].minus})
        if (read && read != out[i]) pieces.push_back({read, read + n, i, false});
    }
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
    const Piece *last = nullptr, *last_written = nullptr;  // those that reach furthest
    for (const Piece& p : pieces) {
      const Piece* const other = p.written ? last : last_written;
      if (other && other->end > p.begin) {
        const size_t i = p.written ? p.input : other->input, j = p.written ? other->input : p.input;
        fail(indexed("out", i) + ": shares memory with " + (p.written && other->written ? indexed("out", j) : indexed("x", j) + " or its minus"));
      }
      if (!last || p.end > last->end) last = &p;
      if (p.written && (!last_written || p.end > last_written->end)) last_written = &p;
    }
  }

  py::object tensors_;  // kept alive
  std::unique_ptr<Selection> selection_;
};

}  // namespace

void bind_topk(py::module_& m) {
  py::class_<PySelection>(m, "Selection")
      .def(py::init<const py::list&, const py::object&, const py::list&, const std::string&, const std::vector<int64_t>&>())
      .def("select", &PySelection::select)
      .def("kept", &PySelection::kept)
      .def("write_mask", &PySelection::write_mask)
      .def("write_dense", &PySelection::write_dense)
      .def("write_sparse", &PySelection::write_sparse);
}

}  // namespace lora_fuse
