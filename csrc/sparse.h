// Sparse matrices of fine-tuned weights: products with a batch, and writes into a dense weight.
#pragma once

namespace lora_fuse {

struct SparseKernels {};

}  // namespace lora_fuse
