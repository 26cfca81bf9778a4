// Sparse matrices of fine-tuned weights: products with a batch, and writes into a dense weight.
#pragma once

#include <cstdint>

#include "views.h"

namespace lora_fuse {

// The order in which a slot's entries lie for the product. Output features are cut into strips of kStrip; a strip's are
// sorted by their number of entries and interleaved kLanes at a time into slices: step k of a slice holds the k-th entry
// of each of its outputs. An entry's column is given by its gap to the entry before (the first: to column 0). Where a gap
// does not fit, fillers go before the entry, each with the largest gap; a slice is as long as its longest output, the rest
// is padding of gap 0. Both have the value 0, and entries of value 0 are skipped.
constexpr int kLanes = 16, kStrip = 64;

inline int64_t num_slices(int64_t outputs) {
  return outputs / kStrip * (kStrip / kLanes) + (outputs % kStrip + kLanes - 1) / kLanes;
}

struct PackedSparse {
  const void* values = nullptr;      // [steps * kLanes]; null: an empty slot
  const void* gaps = nullptr;        // uint8, or uint16 where wide
  const int64_t* starts = nullptr;   // [num_slices + 1], in steps
  const uint8_t* order = nullptr;    // [num_slices * kLanes], the lane's output within its strip; kStrip: none
  const float* bias = nullptr;       // [outputs] or null
  bool wide = false;
};

// y[row] += weight * (U[slot] x[row] + bias[slot]) for every pair of the routing.
template <class T>
struct SparseDelta {
  Matrix<const T> x;  // [num_rows, in]
  Matrix<T> y;        // [num_rows, out]
  const PackedSparse* slots;
  RoutingView routing;
  float* scratch;  // threads * scratch_floats
  int64_t scratch_floats;
  float* totals;  // [num_rows, out], zeros; needed only where a row has several pairs
  int threads;
};

// The largest gap that is stored.
constexpr int64_t widest_gap(bool wide) { return wide ? 65535 : 255; }

// Floats of scratch that a thread needs, for slots of at most max_pairs pairs.
inline int64_t sparse_scratch(int64_t in_features, int64_t max_pairs) {
  return (in_features + 1) * (max_pairs > 16 ? 32 : max_pairs > 8 ? 16 : max_pairs > 4 ? 8 : 4) + 16;
}

// Entries of a matrix with `cols` columns, by rows; columns rise within a row. One of columns and bitmap is null.
struct SparseView {
  const int64_t* starts;   // [rows + 1]
  const void* columns;     // uint16, or int32 where wide
  const uint8_t* bitmap;   // [rows, bitmap_stride]
  int64_t rows, cols, bitmap_stride;
  bool wide;
};

// weight[kept] = values, the previous entries to saved first; each of values and saved may be null. size: bytes of an element.
struct SparseWrite {
  SparseView at;
  void *weight, *saved;  // weight: [rows, cols], contiguous
  const void* values;
  int size;
};

struct SparseKernels {
  void (*delta_f32)(const SparseDelta<float>&);
  void (*delta_bf16)(const SparseDelta<bf16>&);
  void (*delta_fp16)(const SparseDelta<fp16>&);
  void (*write)(const SparseWrite* writes, int64_t count, int threads);
};

}  // namespace lora_fuse
