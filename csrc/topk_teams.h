// Sharing out chunks of entries among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "parallel.h"

namespace lora_fuse {

// Denormal differences count, whatever torch.set_flush_denormal says: it holds for some threads of a team only.
struct KeepDenormals {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  KeepDenormals() { _mm_setcsr(before & ~0x8040u); }  // flush to zero, denormals are zero
  ~KeepDenormals() { _mm_setcsr(before); }
#endif
};

// f(thread, i) for begin <= i < end, `grain` of them at a time to whoever is free.
template <class F>
void each(int threads, int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (threads <= 1 || end - begin <= grain) {
    [[maybe_unused]] const KeepDenormals keep;
    for (int64_t i = begin; i < end; ++i) f(0, i);
    return;
  }
  std::atomic<int64_t> next{begin};
  parallel(threads, [&](int thread, int) {
    [[maybe_unused]] const KeepDenormals keep;
    for (int64_t i; (i = next.fetch_add(grain)) < end;)
      for (const int64_t stop = std::min(end, i + grain); i < stop; ++i) f(thread, i);
  });
}

constexpr int64_t kParallelEntries = 1 << 15;  // fewer are not worth a second thread

inline int size_of_team(int64_t entries, int threads) { return entries < kParallelEntries ? 1 : std::max(threads, 1); }

}  // namespace lora_fuse
