// A torch tensor as C++ sees it: pointer, shape, strides, dtype; borrowed, and read without libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack_abi.h"

namespace lora_fuse {

// Up to 8 dimensions.
struct TensorView {
  char* data;
  int ndim;
  int64_t shape[8], strides[8];
  dlpack::DataType dtype;
  dlpack::Device device;
  bool on_cpu;
};

struct Rows {
  int64_t rows, cols, stride;
};

// Half-open byte range that a row view touches.
struct Extent {
  const char *begin, *end;
};

constexpr dlpack::DataType kInt32{dlpack::kInt, 32, 1}, kFloat32{dlpack::kFloat, 32, 1}, kFloat16{dlpack::kFloat, 16, 1},
    kBfloat16{dlpack::kBfloat, 16, 1}, kInt64{dlpack::kInt, 64, 1}, kUInt8{dlpack::kUInt, 8, 1}, kUInt16{dlpack::kUInt, 16, 1},
    kFloat64{dlpack::kFloat, 64, 1}, kBool{dlpack::kBool, 8, 1};
inline bool same(dlpack::DataType a, dlpack::DataType b) { return a.code == b.code && a.bits == b.bits; }

[[noreturn]] void fail(const std::string& message);  // ValueError

// capsule: torch.Tensor.__dlpack_c_exchange_api__, or None to read tensors through their attributes.
bool use_exchange_api(pybind11::object capsule);

TensorView view(pybind11::handle t, const char* name);   // any device
bool try_view(pybind11::handle t, TensorView* v);         // false where view() throws: sparse, meta, more than 8 dimensions
void expect_memory(const TensorView& v, const char* name);
TensorView host(pybind11::handle t, const char* name);   // refuses other devices and tensors without memory
void expect_vector(const TensorView& v, const char* name, dlpack::DataType dtype, const char* dtype_name, int64_t length);

int64_t count_of(const TensorView& v);  // elements
bool is_contiguous(const TensorView& v);  // row-major without gaps, as torch says it

// [..., cols] as [rows, cols] with one stride between rows; false where no such view exists.
bool collapse(const TensorView& v, Rows* out);
Extent extent(const TensorView& v, const Rows& r);
inline bool overlap(Extent a, Extent b) { return a.begin < b.end && b.begin < a.end; }

std::string show(dlpack::DataType t);
std::string show(const TensorView& v);  // its shape

}  // namespace lora_fuse
