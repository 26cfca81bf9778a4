// y[row] += sum over the row's pairs of weight * scaling * B (A x), y in T, everything between in fp32, one rounding.
//
//   h[p][r]  = (weight * scaling) * dot(A[r], x[row(p)])     shrink: lanes run over in_features
//   y[row]  += sum_p sum_r h[p][r] * B[r]                    expand: lanes run over out_features
//
// Bitwise, a row's result depends on its own x, y, pairs and factors only: each dot has one accumulator vector, cut at
// multiples of K_BLOCK and reduced by a fixed tree; each output sums its pairs by slot and their ranks in order. Tiles
// only decide how many such sums run side by side.
//
// Why not pack A: an adapter is used by too few rows to pay for it, and dot tiles read it as it lies in the pool.

constexpr int K_BLOCK = 1024;               // in_features per pass: a tile's rows of x stay in L1
constexpr int H_FLOATS = kStackWorkspace;   // rows x rank of one block's intermediate, 64 KB of stack
constexpr int MAX_BLOCK_ROWS = 256;
#if LF_WIDTH == 16
constexpr int MR = 6, NR = 4, EXPAND_STEPS = 2;  // 24 accumulators of 32 registers
#else
constexpr int MR = 2, NR = 4, EXPAND_STEPS = 2;  // 8 accumulators of 16 registers
#endif
constexpr int EXPAND_ROWS = 8 * MR;         // rows that expand takes across all columns: their lines of y stay prefetched
constexpr int AXPY_ROWS = 2;                // up to so many rows, expand streams whole rank rows
constexpr int AXPY_STEPS = 512 / STEP;      // columns of fp32 sums per row held in L1 then

// A few rows stream whole rank rows. Of short ones the hardware prefetcher sees too little: ask for the next in time.
template <class T>
bool short_rows(int64_t cols) {
  return cols * int64_t(sizeof(T)) <= 8192;
}

// Asks for the beginnings of the first rows of a factor, 8 KB at most, before its turn comes.
template <class T>
void fetch_head(const T* p, int64_t ld, int rows, int64_t cols) {
  const int64_t bytes = cols * int64_t(sizeof(T)) < 2048 ? cols * int64_t(sizeof(T)) : 2048;
  for (int i = 0; i < rows && i < 4; ++i)
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(p + i * ld) + line);
}

#include "shrink.inl"
#include "expand.inl"
#ifdef LF_AMX
#include "lora_amx.inl"
#endif

// ---- a call ----

template <class T>
struct Call {
  const MultiLora<T>& p;

  int rank(int slot) const { return p.slot_rank[slot]; }
  const T* a(int slot) const { return p.a.row(int64_t(slot) * p.max_rank); }
  const T* b(int slot) const { return p.b.row(int64_t(slot) * p.max_rank); }
  float factor(int pair, int slot) const {
    return p.routing.weights ? p.slot_scaling[slot] * p.routing.weights[pair] : p.slot_scaling[slot];
  }

  // Whole rows, pairs [begin, end): shrink and expand a block at a time, its intermediate in this core's cache.
  void rows(int begin, int end) const {
    alignas(64) float h[H_FLOATS];
    const T* x[MAX_BLOCK_ROWS];
    T* y[MAX_BLOCK_ROWS];
    const int32_t* const starts = p.routing.starts;
    for (int slot = 0; begin < end; ++slot) {
      const int stop = starts[slot + 1] < end ? starts[slot + 1] : end;
      if (stop <= begin) continue;
      const int r = rank(slot);
#ifdef LF_AMX
      if constexpr (Dot<T>::TILES)
        if (starts[slot + 1] - starts[slot] >= AMX_MIN_ROWS && r > 0 && r <= AMX_MAX_RANK) {
          amx_rows(p, slot, begin, stop);
          begin = stop;
          continue;
        }
#endif
      const int block = r == 0 ? 0 : H_FLOATS / r < MAX_BLOCK_ROWS ? H_FLOATS / r : MAX_BLOCK_ROWS;
      for (; r > 0 && begin < stop; begin += block) {
        const int m = stop - begin < block ? stop - begin : block;
        for (int i = 0; i < m; ++i) {
          x[i] = p.x.row(p.routing.rows[begin + i]);
          y[i] = p.y.row(p.routing.rows[begin + i]);
        }
        if (m <= MR) fetch_head(b(slot), p.b.stride, r, p.y.cols);
        shrink(x, m, p.x.cols, a(slot), p.a.stride, r, h, r);
        if (m <= MR && stop < end) {
          int next = slot + 1;
          while (starts[next + 1] <= stop) ++next;
          fetch_head(a(next), p.a.stride, rank(next), p.x.cols);
        }
        for (int i = 0; i < m; ++i) {
          const float f = factor(begin + i, slot);
          for (int j = 0; j < r; ++j) h[i * r + j] *= f;
        }
        expand(h, r, m, r, b(slot), p.b.stride, y, 0, p.y.cols);
      }
      begin = stop;
    }
  }

  // Few rows, large features: the team shares the ranks of the shrink, then the columns of the expand.
  void features(float* h, int thread, int threads) const {
    const RoutingView& route = p.routing;
    const int64_t ldh = p.max_rank;
    // shrink: units of (8 ranks, pair), rank by rank within a slot, dealt out in runs
    constexpr int UNIT = 8;
    const auto tiles_of = [&](int s) { return (rank(s) + UNIT - 1) / UNIT; };
    int64_t total = 0;
    for (int s = 0; s < route.num_slots; ++s) total += int64_t(route.starts[s + 1] - route.starts[s]) * tiles_of(s);
    int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
    for (int s = 0; s < route.num_slots && last > 0; ++s) {
      const int64_t m = route.starts[s + 1] - route.starts[s], units = m * tiles_of(s);
      const int64_t end = last < units ? last : units;
      for (int64_t u = first > 0 ? first : 0; u < end;) {
        const int pair = int(u % m), r0 = int(u / m) * UNIT, begin = route.starts[s] + pair;
        if (pair == 0 && end - u >= m) {  // whole tiles: all pairs at once
          const int64_t whole = (end - u) / m;
          shrink_pairs(s, begin, begin + int(m), r0, int(whole) * UNIT, h, ldh);
          u += whole * m;
        } else {
          const int64_t n = end - u < m - pair ? end - u : m - pair;
          shrink_pairs(s, begin, begin + int(n), r0, UNIT, h, ldh);
          u += n;
        }
      }
      first -= units, last -= units;
    }
    if (threads > 1) team_barrier();
    const int64_t steps = (p.y.cols + STEP - 1) / STEP;
    const int64_t n0 = steps * thread / threads * STEP, n1 = steps * (thread + 1) / threads * STEP;
    expand_columns(h, ldh, n0, n1 < p.y.cols ? n1 : p.y.cols);
  }

  // Ranks [r0, r0 + n) of pairs [begin, end) of one slot.
  void shrink_pairs(int slot, int begin, int end, int r0, int n, float* h, int64_t ldh) const {
    const T* x[MAX_BLOCK_ROWS];
    if (n > rank(slot) - r0) n = rank(slot) - r0;
    for (int q = begin; q < end; q += MAX_BLOCK_ROWS) {
      const int m = end - q < MAX_BLOCK_ROWS ? end - q : MAX_BLOCK_ROWS;
      for (int i = 0; i < m; ++i) x[i] = p.x.row(p.routing.rows[q + i]);
      shrink(x, m, p.x.cols, a(slot) + r0 * p.a.stride, p.a.stride, n, h + q * ldh + r0, ldh);
      for (int i = 0; i < m; ++i) {
        const float f = factor(q + i, slot);
        for (int j = 0; j < n; ++j) h[(q + i) * ldh + r0 + j] *= f;
      }
    }
  }

  void expand_columns(const float* h, int64_t ldh, int64_t n0, int64_t n1) const {
    const RoutingView& route = p.routing;
    if (n0 >= n1) return;
    if (!route.row_starts) {
      T* y[MAX_BLOCK_ROWS];
      for (int s = 0; s < route.num_slots; ++s)
        for (int q = route.starts[s]; rank(s) > 0 && q < route.starts[s + 1]; q += MAX_BLOCK_ROWS) {
          const int m = route.starts[s + 1] - q < MAX_BLOCK_ROWS ? route.starts[s + 1] - q : MAX_BLOCK_ROWS;
          for (int i = 0; i < m; ++i) y[i] = p.y.row(route.rows[q + i]);
          expand(h + q * ldh, ldh, m, rank(s), b(s), p.b.stride, y, n0, n1);
        }
      return;
    }
    // Rows with several pairs: a strip of columns at a time, so that the strips of B stay in cache from row to row.
    constexpr int64_t STRIP = 8 * STEP;
    for (int64_t n = n0; n < n1; n += STRIP)
      for (int64_t row = 0; row < p.y.rows; ++row)
        if (route.row_starts[row] < route.row_starts[row + 1]) expand_mixed(h, ldh, row, n, n + STRIP < n1 ? n + STRIP : n1);
  }

  // One row's columns [n0, n1), summed over its pairs in fp32 and rounded once.
  void expand_mixed(const float* h, int64_t ldh, int64_t row, int64_t n0, int64_t n1) const {
    const RoutingView& route = p.routing;
    for (int64_t n = n0; n < n1; n += STEP) {
      const int64_t width = n1 - n < STEP ? n1 - n : STEP;
      vf acc0 = {}, acc1 = {};
      for (int q = route.row_starts[row]; q < route.row_starts[row + 1]; ++q) {
        const int pair = route.row_pairs[q], slot = slot_of(pair);
        const T* br = b(slot) + n;
        vf sum0 = {}, sum1 = {};
        for (int r = 0; r < rank(slot); ++r, br += p.b.stride) {
          const T* src = br;
          T bt[STEP] = {};
          if (width < STEP) __builtin_memcpy(bt, br, width * sizeof(T)), src = bt;
          const vf hv = splat(h[pair * ldh + r]);
          sum0 += hv * Elem<T>::template load<0>(src);
          sum1 += hv * Elem<T>::template load<1>(src);
        }
        acc0 += sum0, acc1 += sum1;
      }
      T* const dst = p.y.row(row) + n;
      T yt[STEP] = {};
      __builtin_memcpy(yt, dst, width * sizeof(T));
      Elem<T>::store(yt, Elem<T>::template load<0>(yt) + acc0, Elem<T>::template load<1>(yt) + acc1);
      __builtin_memcpy(dst, yt, width * sizeof(T));
    }
  }

  int slot_of(int pair) const {  // the last slot whose segment starts at or before the pair
    int lo = 0, hi = p.routing.num_slots;
    while (hi - lo > 1) {
      const int mid = (lo + hi) / 2;
      (p.routing.starts[mid] <= pair ? lo : hi) = mid;
    }
    return lo;
  }
};

// The first pair at which the ranks of all pairs before it add up to `cost`.
template <class T>
int pair_at(const MultiLora<T>& p, int64_t cost) {
  int64_t seen = 0;
  for (int s = 0; s < p.routing.num_slots; ++s) {
    const int64_t pairs = p.routing.starts[s + 1] - p.routing.starts[s], r = p.slot_rank[s];
    if (seen + pairs * r >= cost) return p.routing.starts[s] + (r ? int((cost - seen + r - 1) / r) : 0);
    seen += pairs * r;
  }
  return p.routing.num_pairs;
}

// Whether whole rows can be dealt out so that each factor is read by one thread, mostly, and no thread waits for long:
// several slots a thread, and shares of the ranks that differ by an eighth at most.
template <class T>
bool deals_out(const MultiLora<T>& p, int64_t ranks, int threads) {
  const int32_t* const starts = p.routing.starts;
  int slots = 0;
  for (int s = 0; s < p.routing.num_slots; ++s) slots += starts[s + 1] > starts[s];
  if (slots < 2 * threads) return false;
  for (int t = 0; t < threads; ++t) {
    const int begin = pair_at(p, ranks * t / threads), end = pair_at(p, ranks * (t + 1) / threads);
    int64_t share = 0;
    for (int s = 0; s < p.routing.num_slots; ++s) {
      const int lo = starts[s] > begin ? starts[s] : begin, hi = starts[s + 1] < end ? starts[s + 1] : end;
      if (lo < hi) share += int64_t(hi - lo) * p.slot_rank[s];
    }
    if (share * threads > ranks + ranks / 8) return false;
  }
  return true;
}

template <class T>
int64_t ranks_of(const MultiLora<T>& p) {  // summed over pairs
  int64_t ranks = 0;
  for (int s = 0; s < p.routing.num_slots; ++s) ranks += int64_t(p.routing.starts[s + 1] - p.routing.starts[s]) * p.slot_rank[s];
  return ranks;
}

// The slot whose pairs the team shares on tiles, or -1.
template <class T>
int one_slot([[maybe_unused]] const MultiLora<T>& p, [[maybe_unused]] int threads) {
#ifdef LF_AMX
  if constexpr (Dot<T>::TILES) return amx_one_slot(p, threads);
#endif
  return -1;
}

template <class T>
bool intermediate_fits(const MultiLora<T>& p) {
  return int64_t(p.routing.num_pairs) * p.max_rank <= H_FLOATS;
}

// Whether each thread takes whole rows, and not all threads a part of every row.
template <class T>
bool goes_by_rows(const MultiLora<T>& p, int64_t ranks, int threads) {
  if (p.routing.row_starts) return false;
#ifdef LF_AMX
  if constexpr (Dot<T>::TILES)  // tiles or not must not depend on the number of threads
    if (amx_any(p)) return true;
#endif
  return threads == 1 || p.routing.num_pairs >= 8 * threads || !intermediate_fits(p) || deals_out(p, ranks, threads);
}

template <class T>
void multi_lora_alone(const MultiLora<T>& p) {
  const Call<T> call{p};
  const int64_t ranks = ranks_of(p);
  if (ranks == 0 || p.x.cols == 0) return;
  const int64_t work = ranks * (p.x.cols + p.y.cols);  // multiply-adds
  const int threads = work < PARALLEL_MIN_WORK ? 1 : p.threads;
  const int slot = one_slot(p, threads);
  if (slot < 0 && goes_by_rows(p, ranks, threads)) {
    parallel(threads, [&](int thread, int team) {
      call.rows(pair_at(p, ranks * thread / team), pair_at(p, ranks * (thread + 1) / team));
    });
    return;
  }
  alignas(64) float stack_h[H_FLOATS];
#ifdef LF_AMX
  if constexpr (Dot<T>::TILES)
    if (slot >= 0) {
      parallel(threads, [&](int thread, int team) { amx_shared(p, slot, stack_h, thread, team); });
      return;
    }
#endif
  float* const h = intermediate_fits(p) ? stack_h : p.workspace;
  parallel(threads, [&](int thread, int team) { call.features(h, thread, team); });
}

// Slices of one layer that share x and the routing. One team does them all, where more than one thread has work.
template <class T>
void multi_lora(const MultiLora<T>* slices, int n) {
  int64_t ranks[kMaxSlices], work = 0;
  for (int i = 0; i < n; ++i) ranks[i] = ranks_of(slices[i]), work += ranks[i] * (slices[i].x.cols + slices[i].y.cols);
  const int threads = n < 2 || work < PARALLEL_MIN_WORK || slices[0].x.cols == 0 ? 1 : slices[0].threads;
  bool together = threads > 1;
  for (int i = 0; i < n && together; ++i) together = intermediate_fits(slices[i]) && one_slot(slices[i], threads) < 0;
  if (!together) {
    for (int i = 0; i < n; ++i) multi_lora_alone(slices[i]);
    return;
  }
  bool by_rows[kMaxSlices];
  for (int i = 0; i < n; ++i) by_rows[i] = goes_by_rows(slices[i], ranks[i], threads);
  // Two: who writes the second has met, at its barrier, all who read the first.
  alignas(64) float stack_h[2][H_FLOATS];
  parallel(threads, [&](int thread, int team) {
    int turn = 0;
    for (int i = 0; i < n; ++i) {
      const MultiLora<T>& p = slices[i];
      const Call<T> call{p};
      if (ranks[i] == 0) continue;
      if (by_rows[i])
        call.rows(pair_at(p, ranks[i] * thread / team), pair_at(p, ranks[i] * (thread + 1) / team));
      else
        call.features(stack_h[turn++ % 2], thread, team);
    }
  });
}

inline void fill(KernelTable& table) {
  table.multi_lora_f32 = multi_lora<float>;
  table.multi_lora_bf16 = multi_lora<bf16>;
  table.multi_lora_fp16 = multi_lora<fp16>;
}
