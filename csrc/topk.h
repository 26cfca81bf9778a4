// Exact selection of the largest magnitudes.
#pragma once

namespace lora_fuse {

struct TopkKernels {};

}  // namespace lora_fuse
