#include "tensors.h"

namespace py = pybind11;

namespace lora_fuse {

using dlpack::DataType;

namespace {

const dlpack::ExchangeApi* exchange_api = nullptr;  // set once at import; null: read tensors through their attributes

TensorView through_attributes(py::handle t, const char* name) {
  TensorView v{};
  if (!py::hasattr(t, "data_ptr")) throw py::type_error(std::string(name) + ": expected a torch.Tensor");
  const std::string device = t.attr("device").attr("type").cast<std::string>();
  const py::object index = t.attr("device").attr("index");
  v.on_cpu = device == "cpu";
  v.device = {v.on_cpu ? dlpack::kCPU : device == "cuda" ? dlpack::kCUDA : 0, index.is_none() ? 0 : index.cast<int32_t>()};
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
  else if (dtype == "torch.int64") v.dtype = {dlpack::kInt, 64, 1};
  else if (dtype == "torch.uint8") v.dtype = {dlpack::kUInt, 8, 1};
  else if (dtype == "torch.uint16") v.dtype = {dlpack::kUInt, 16, 1};
  else if (dtype == "torch.float64") v.dtype = {dlpack::kFloat, 64, 1};
  else if (dtype == "torch.bool") v.dtype = {dlpack::kBool, 8, 1};
  return v;  // any other: {0, 0, 0}, which matches nothing
}

}  // namespace

void fail(const std::string& message) { throw py::value_error(message); }

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
  v.device = d.device;
  v.on_cpu = d.device.type == dlpack::kCPU;
  int64_t dense = 1;
  for (int i = d.ndim - 1; i >= 0; --i) {
    v.shape[i] = d.shape[i];
    v.strides[i] = d.strides ? d.strides[i] : dense;
    dense *= d.shape[i];
  }
  return v;
}

bool try_view(py::handle t, TensorView* v) {
  try {
    *v = view(t, "");
    return true;
  } catch (const py::builtin_exception&) {
  } catch (const py::error_already_set&) {
  }
  return false;
}

// Tensors may claim elements and own no memory: freed storages, torch's zero tensors.
void expect_memory(const TensorView& v, const char* name) {
  if (!v.data && count_of(v)) fail(std::string(name) + ": its storage is not allocated");
}

TensorView host(py::handle t, const char* name) {
  const TensorView v = view(t, name);
  if (!v.on_cpu) fail(std::string(name) + ": expected a CPU tensor, as x is");
  expect_memory(v, name);
  return v;
}

void expect_vector(const TensorView& v, const char* name, DataType dtype, const char* dtype_name, int64_t length) {
  if (v.ndim != 1 || !same(v.dtype, dtype) || v.shape[0] != length || (length > 1 && v.strides[0] != 1))
    fail(std::string(name) + ": expected a contiguous " + dtype_name + " tensor of shape [" + std::to_string(length) +
         "], got shape " + show(v));
}

int64_t count_of(const TensorView& v) {
  int64_t n = 1;
  for (int i = 0; i < v.ndim; ++i) n *= v.shape[i];
  return n;
}

bool is_contiguous(const TensorView& v) {
  int64_t dense = 1;
  if (count_of(v) == 0) return true;
  for (int i = v.ndim - 1; i >= 0; --i) {
    if (v.shape[i] != 1 && v.strides[i] != dense) return false;
    dense *= v.shape[i];
  }
  return true;
}

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
    else if (v.shape[i] != 0 && out->rows != 0 && v.strides[i] != out->stride * out->rows) return false;
    out->rows *= v.shape[i];
  }
  return true;
}

Extent extent(const TensorView& v, const Rows& r) {
  if (r.rows == 0 || r.cols == 0) return {v.data, v.data};
  const int64_t size = v.dtype.bits / 8, far = (r.rows - 1) * r.stride;
  return {v.data + (far < 0 ? far * size : 0), v.data + ((far > 0 ? far : 0) + r.cols) * size};
}

std::string show(DataType t) {
  const char* const kind = t.code == dlpack::kFloat ? "float" : t.code == dlpack::kBfloat ? "bfloat" : t.code == dlpack::kInt ? "int" : t.code == dlpack::kUInt ? "uint" : t.code == dlpack::kBool ? "bool" : "type ";
  return kind + std::to_string(t.bits);
}

std::string show(const TensorView& v) {
  std::string s = "[";
  for (int i = 0; i < v.ndim; ++i) s += (i ? ", " : "") + std::to_string(v.shape[i]);
  return s + "]";
}

}  // namespace lora_fuse
