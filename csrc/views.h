// What kernels know of tensors: typed, strided views and the description of one multi_lora call.
#pragma once

#include <cstdint>

namespace lora_fuse {

constexpr int kStackWorkspace = 16384;  // floats of intermediate that a call keeps on its stack
constexpr int kMaxSlices = 8;           // calls that share x and routing, in one

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;  // stride in elements; columns are contiguous
  T* row(int64_t i) const { return data + i * stride; }
};

// Pairs (row, slot, weight) sorted by slot; slot s owns pairs starts[s] .. starts[s + 1].
struct RoutingView {
  const int32_t* rows;
  const float* weights;       // null: all 1
  const int32_t* starts;      // [num_slots + 1]
  const int32_t* row_starts;  // [num_rows + 1], null when no row has several pairs
  const int32_t* row_pairs;   // [num_pairs]
  int32_t num_pairs, num_slots;
};

// y[row] += weight * scaling[slot] * B[slot] (A[slot] x[row]) for every pair.
template <class T>
struct MultiLora {
  Matrix<const T> x;     // [num_rows, in]
  Matrix<T> y;           // [num_rows, out]
  Matrix<const T> a, b;  // [num_slots * max_rank, in] and [.., out]
  const int32_t* slot_rank;
  const float* slot_scaling;
  int32_t max_rank;
  RoutingView routing;
  float* workspace;  // [num_pairs, max_rank], needed only where a row has several pairs; else may be null
  int threads;
};

}  // namespace lora_fuse
