// The kernels, compiled once per instruction set from the same text. No -m flags: the target is set around each
// inclusion, so that nothing outside (standard headers, bindings) ever needs more than the ABI's floor.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "views.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LF_X86 1
#include <immintrin.h>
#endif

namespace lora_fuse {

// Multiply-adds below which a second thread costs more than it brings (a parallel region is about 2 us).
constexpr int64_t PARALLEL_MIN_WORK = 48 * 1024;

#define LF_WIDTH 4
namespace baseline {
#include "simd.inl"
#include "lora.inl"
#include "topk.inl"
#include "sparse.inl"
#include "normals.inl"
}  // namespace baseline
#undef LF_WIDTH

#ifdef LF_X86
#define LF_F16C 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LF_WIDTH 8
namespace avx2 {
#include "simd.inl"
#include "lora.inl"
#include "topk.inl"
#include "sparse.inl"
#include "normals.inl"
}  // namespace avx2
#undef LF_WIDTH
#pragma GCC pop_options

#define LF_WIDTH 16
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#include "simd.inl"
#include "lora.inl"
#include "topk.inl"
#include "sparse.inl"
#include "normals.inl"
}  // namespace avx512
#pragma GCC pop_options

#define LF_BF16_DOT 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
namespace avx512_bf16 {
#include "simd.inl"
#include "lora.inl"
}  // namespace avx512_bf16
#pragma GCC pop_options

#define LF_AMX 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
namespace amx_bf16 {
#include "simd.inl"
#include "lora.inl"
}  // namespace amx_bf16
#pragma GCC pop_options
#undef LF_AMX
#undef LF_BF16_DOT
#undef LF_WIDTH
#endif  // LF_X86

std::vector<const KernelTable*> compiled_tables() {
  static const std::vector<KernelTable> tables = [] {
    std::vector<KernelTable> t;
    const auto add = [&](const char* name, void (*lora)(KernelTable&), void (*topk)(TopkKernels&), void (*sparse)(SparseKernels&),
                         NormalsKernel normals) {
      t.push_back({name, nullptr, nullptr, nullptr, {}, {}, normals});
      lora(t.back());
      topk(t.back().topk);
      sparse(t.back().sparse);
    };
    add("baseline", baseline::fill, baseline::fill_topk, baseline::fill_sparse, baseline::normals);
#ifdef LF_X86
    add("avx2", avx2::fill, avx2::fill_topk, avx2::fill_sparse, avx2::normals);
    add("avx512", avx512::fill, avx512::fill_topk, avx512::fill_sparse, avx512::normals);
    add("avx512_bf16", avx512_bf16::fill, avx512::fill_topk, avx512::fill_sparse, avx512::normals);
    add("amx_bf16", amx_bf16::fill, avx512::fill_topk, avx512::fill_sparse, avx512::normals);
#endif
    return t;
  }();
  std::vector<const KernelTable*> all;
  for (const KernelTable& t : tables) all.push_back(&t);
  return all;
}

}  // namespace lora_fuse
