#include "normals.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace lora_fuse {

void fill_normals(float* out, int64_t matrices, int64_t rows, int64_t cols, uint64_t seed, uint32_t draw, int threads) {
  constexpr int64_t kFewest = 4096;  // numbers worth a thread
  const int64_t groups = rows / kNormalsChunk * kNormalsGroup + std::min<int64_t>(rows % kNormalsChunk, kNormalsGroup);
  const int team = int(std::clamp<int64_t>(matrices * rows * cols / kFewest, 1, threads));
  const NormalsKernel kernel = kernels().normals;
  parallel(team, [&](int thread, int num_threads) {
    const int64_t all = matrices * groups;
    for (int64_t i = all * thread / num_threads; i < all * (thread + 1) / num_threads; ++i) {
      const int64_t matrix = i / groups, group = i % groups;
      const int64_t first_row = group / kNormalsGroup * kNormalsChunk + group % kNormalsGroup;
      kernel({out + matrix * rows * cols, rows, cols, first_row, uint32_t(matrix), draw, seed});
    }
  });
}

}  // namespace lora_fuse
