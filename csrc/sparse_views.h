// Tensors that sparse matrices and pools share the form of, checked.
#pragma once

#include <string>

#include "sparse.h"
#include "tensors.h"

namespace lora_fuse {

inline int64_t length_of(const TensorView& v) { return v.ndim == 1 ? v.shape[0] : 0; }

// A contiguous int64 tensor of count + 1 numbers that rise from 0.
inline const int64_t* rising(pybind11::handle t, const char* name, int64_t count) {
  const TensorView v = host(t, name);
  expect_vector(v, name, kInt64, "int64", count + 1);
  const auto* const starts = reinterpret_cast<const int64_t*>(v.data);
  bool rises = starts[0] == 0;
  for (int64_t i = 0; i < count; ++i) rises &= starts[i] <= starts[i + 1];
  if (!rises) fail(std::string(name) + ": must rise from 0");
  return starts;
}

// Where each slice starts, in steps, for `entries` in all.
inline const int64_t* slice_starts(pybind11::handle t, int64_t outputs, int64_t entries) {
  const int64_t slices = num_slices(outputs);
  const int64_t* const starts = rising(t, "starts", slices);
  if (entries % kLanes || starts[slices] != entries / kLanes) fail("starts: does not end at the number of steps");
  return starts;
}

// uint16 or int32, contiguous.
inline bool wide_columns(const TensorView& v, const char* name, int64_t length) {
  const bool wide = same(v.dtype, kInt32);
  expect_vector(v, name, wide ? kInt32 : kUInt16, "uint16 or int32", length);
  return wide;
}

// uint16 or uint8, contiguous.
inline bool wide_gaps(const TensorView& v, const char* name, int64_t length) {
  const bool wide = same(v.dtype, kUInt16);
  expect_vector(v, name, wide ? kUInt16 : kUInt8, "uint8 or uint16", length);
  return wide;
}

}  // namespace lora_fuse
