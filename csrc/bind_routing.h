// The five tensors of a Routing, checked: every index that a kernel will follow.
#pragma once

#include "tensors.h"
#include "views.h"

namespace lora_fuse {

constexpr int64_t kReleaseGil = 1 << 15;  // multiply-adds, about a microsecond: less is done before another thread wakes

inline bool has_kernel(dlpack::DataType t) { return same(t, kFloat32) || same(t, kBfloat16) || same(t, kFloat16); }

// route: (rows, weights, segment_starts, row_starts, row_pairs); ValueError naming what does not fit.
RoutingView read_routing(const pybind11::tuple& route, int64_t num_slots, int64_t num_rows);

// Whether x [..., features] has as many rows as a Routing is for.
bool has_rows_of(const TensorView& x, pybind11::handle routing);

}  // namespace lora_fuse
