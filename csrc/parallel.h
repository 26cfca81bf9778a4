// Threads come from the OpenMP runtime that torch has loaded; a forked child runs serially, since its team is gone.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lora_fuse {

bool forked();  // true in a child of the process that loaded the extension

// f(thread, num_threads), once per thread of a team of at most `threads`.
template <class F>
void parallel(int threads, const F& f) {
#ifdef _OPENMP
  if (threads > 1 && !forked()) {
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  f(0, 1);
}

// Waits for the team of the enclosing parallel(); does nothing outside one.
inline void team_barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

}  // namespace lora_fuse
