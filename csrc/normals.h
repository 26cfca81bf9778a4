// Normal numbers that hang on (seed, draw, matrix, row, column) alone: Philox 4x32-10 and Box-Muller in fp32.
//
// Rows go in chunks of 128, whose rows i, i + 32, i + 64 and i + 96 (i < 32) share a call of Philox: entry (b, r, c) of a
// draw has the counter (32 * (r / 128) + r % 32, c, b, draw), key (low, high half of the seed), and word t = (r / 32) % 4.
// Words 2p and 2p + 1 make a pair: u = ((w[2p] >> 9) + 1/2) 2^-23, angle = int32(w[2p + 1]) pi 2^-31, and the entries are
// sqrt(-2 ln u) cos(angle) for t = 2p, sqrt(-2 ln u) sin(angle) for t = 2p + 1. kernels/normals.py draws the same.
#pragma once

#include <cstdint>

namespace lora_fuse {

constexpr int kNormalsGroup = 32;                 // rows between those that share a call
constexpr int kNormalsChunk = 4 * kNormalsGroup;  // rows

// Rows first_row, + 32, + 64 and + 96, as far as there are any, of a [rows, cols] matrix with contiguous rows.
struct NormalsGroup {
  float* data;
  int64_t rows, cols, first_row;
  uint32_t matrix, draw;
  uint64_t seed;
};

using NormalsKernel = void (*)(const NormalsGroup&);

// out: [matrices, rows, cols], contiguous.
void fill_normals(float* out, int64_t matrices, int64_t rows, int64_t cols, uint64_t seed, uint32_t draw, int threads);

}  // namespace lora_fuse
