// The layout of a routing: which rows use which slots, sorted by slot, then row.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace lora_fuse {

using Entry = std::vector<std::pair<int, float>>;  // (slot, weight), by slot

struct RoutingArrays {
  int32_t* rows;
  float* weights;  // null: all ones
  int32_t* starts;
  int32_t *row_starts, *row_pairs;  // null: at most one pair a row
  int64_t num_pairs, num_rows, num_slots;
};

// Row (o, s, i) of [outer, samples, inner] gets the pairs of entries[which[s]]. The arrays are as long as that takes.
void fill_routing(const RoutingArrays& out, const std::vector<Entry>& entries, const std::vector<int>& which, int64_t outer,
                  int64_t inner);

}  // namespace lora_fuse
