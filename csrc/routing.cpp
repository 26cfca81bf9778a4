#include "routing.h"

namespace lora_fuse {

void fill_routing(const RoutingArrays& out, const std::vector<Entry>& entries, const std::vector<int>& which, int64_t outer,
                  int64_t inner) {
  std::vector<int32_t> next(out.num_slots + 1, 0);  // first the pairs of the slot before, then each slot's next free pair
  for (const int k : which)
    for (const auto& pair : entries[k]) next[pair.first + 1] += int32_t(outer * inner);
  for (int64_t s = 0; s < out.num_slots; ++s) next[s + 1] += next[s];
  for (int64_t s = 0; s <= out.num_slots; ++s) out.starts[s] = next[s];
  int32_t row = 0, seen = 0;
  for (int64_t o = 0; o < outer; ++o)
    for (const int k : which)
      for (int64_t i = 0; i < inner; ++i, ++row) {
        if (out.row_starts) out.row_starts[row] = seen;
        for (const auto& [slot, weight] : entries[k]) {
          const int32_t at = next[slot]++;
          out.rows[at] = row;
          if (out.weights) out.weights[at] = weight;
          if (out.row_pairs) out.row_pairs[seen] = at;
          ++seen;
        }
      }
  if (out.row_starts) out.row_starts[row] = seen;
}

}  // namespace lora_fuse
