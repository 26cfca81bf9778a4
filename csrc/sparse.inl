// y[row] += sum over the row's pairs of weight * (U x[row] + bias), U sparse and packed as sparse.h says; fp32 sums, one
// rounding.
//
// Few rows (AVX-512): lanes run over the outputs of a slice, x is gathered by column; in bf16 a gather brings two rows.
// More rows: x is transposed to [in][G] in fp32 and lanes run over G rows, one broadcast multiply-add per kept entry.
// Both add an output's entries in the order of their columns, cut every SPARSE_BLOCK entries: the same bits, whatever the
// other rows, their order and the number of threads.
//
// Why not expand to dense dots: it costs 1 / density as many multiply-adds; the gather costs no more already at 10 %.

constexpr int SPARSE_BLOCK = 32;  // entries of an output that are summed before the sum joins its total: short chains

// Of one row's sums over a strip: a place more for the lanes of a last slice that are nobody's, and whole cache lines.
constexpr int SUMS_STRIDE = kStrip + 16;

template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * N)));
  typedef float mem __attribute__((vector_size(4 * N), aligned(4), may_alias));
};

// ---- W elements in memory order, to fp32 and back ----
template <class T>
struct Linear {  // fp32 and fp16
  static vf load(const T* p) { return Elem<T>::template load<0>(p); }
};
template <>
struct Linear<bf16> {
  typedef uint16_t half_mem __attribute__((vector_size(2 * W), aligned(2), may_alias));
  static vf load(const bf16* p) {
    return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const half_mem*>(p), vu) << 16);
  }
};
inline void store_linear(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
inline void store_linear(fp16* p, vf v) { Elem<fp16>::store_half(p, v); }
inline void store_linear(bf16* p, vf v) {
  typedef uint16_t half __attribute__((vector_size(2 * W)));
  *reinterpret_cast<Linear<bf16>::half_mem*>(p) = __builtin_convertvector(Elem<bf16>::rounded(v) >> 16, half);
}
template <class T>
vf load_part(const T* p, int64_t n) {  // the first n elements, then zeros
  if (n >= W) return Linear<T>::load(p);
  T part[W] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return Linear<T>::load(part);
}
template <class T>
void store_part(T* p, vf v, int64_t n) {
  if (n >= W) return store_linear(p, v);
  T part[W];
  store_linear(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}

// `values` as floats: as they lie, or converted into buffer.
inline const float* as_floats(const float* values, int, float*) { return values; }
template <class T>
const float* as_floats(const T* values, int n, float* buffer) {  // n is a multiple of kLanes
  int i = 0;
  for (; i + W <= n; i += W) store_linear(buffer + i, Linear<T>::load(values + i));
  if (i < n) store_linear(buffer + i, load_part(values + i, n - i));
  return buffer;
}

inline __attribute__((always_inline)) void transpose(vf (&t)[W]) {  // log2(W) rounds of interleaving halves
#if LF_WIDTH == 16
  const vi lo = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const vi hi = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#elif LF_WIDTH == 8
  const vi lo = {0, 8, 1, 9, 2, 10, 3, 11}, hi = {4, 12, 5, 13, 6, 14, 7, 15};
#else
  const vi lo = {0, 4, 1, 5}, hi = {2, 6, 3, 7};
#endif
#pragma GCC unroll 4
  for (int n = 1; n < W; n *= 2) {
    vf u[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      u[2 * i] = __builtin_shuffle(t[i], t[i + W / 2], lo);
      u[2 * i + 1] = __builtin_shuffle(t[i], t[i + W / 2], hi);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) t[i] = u[i];
  }
}

// ---- one slice ----

// Bytes that loads are ahead of their use: a stream of entries is longer than what the hardware prefetches by itself.
constexpr int AHEAD = 2048;
inline void fetch_ahead(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(uintptr_t(p) + AHEAD + i));
}

// The columns of n steps, from their gaps; nowhere: the column of entries that are skipped. last: each lane's column.
template <class C>
void columns_of(const C* gaps, const float* values, int n, int32_t nowhere, int32_t (&last)[kLanes], int32_t* columns) {
  typedef int32_t lanes __attribute__((vector_size(4 * kLanes)));
  typedef float floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  typedef C gap_lanes __attribute__((vector_size(sizeof(C) * kLanes), aligned(sizeof(C)), may_alias));
  lanes column, nowhere_lanes = nowhere - lanes{};
  __builtin_memcpy(&column, last, sizeof column);
  for (int s = 0; s < n; ++s) {
    column += __builtin_convertvector(*reinterpret_cast<const gap_lanes*>(gaps + s * kLanes), lanes);
    const lanes skipped = *reinterpret_cast<const floats*>(values + s * kLanes) == floats{};
    const lanes at = (nowhere_lanes & skipped) | (column & ~skipped);
    __builtin_memcpy(columns + s * kLanes, &at, sizeof at);
  }
  __builtin_memcpy(last, &column, sizeof column);
}

// sums[order[lane]][i] = sum over the lane's entries of value * xt[column][i], G rows i; xt[cols] is zeros.
template <int G, class T, class C>
void slice_rows(const T* values, const C* gaps, int64_t steps, const float* xt, int64_t cols, const uint8_t* order, float* sums) {
  constexpr int N = G < W ? G : W, H = G / N;  // H vectors of N rows
  using V = typename Lanes<N>::type;
  using Mem = typename Lanes<N>::mem;
  alignas(64) float buffer[SPARSE_BLOCK * kLanes];
  alignas(64) int32_t columns[SPARSE_BLOCK * kLanes], last[kLanes] = {};
  V total[kLanes][H] = {};
  constexpr int PART = 8;  // lanes at a time: what the registers hold
  for (int64_t s0 = 0; s0 < steps; s0 += SPARSE_BLOCK) {
    const int n = int(steps - s0 < SPARSE_BLOCK ? steps - s0 : SPARSE_BLOCK);
    fetch_ahead(values + s0 * kLanes, n * kLanes * int(sizeof(T))), fetch_ahead(gaps + s0 * kLanes, n * kLanes * int(sizeof(C)));
    const float* v = as_floats(values + s0 * kLanes, n * kLanes, buffer);
    columns_of(gaps + s0 * kLanes, v, n, int32_t(cols), last, columns);
    for (int part = 0; part < kLanes; part += PART) {
      V acc[PART][H] = {};
      for (int i = part; i < n * kLanes; i += kLanes)
#pragma GCC unroll 8
        for (int l = 0; l < PART; ++l) {
          const float* const x = xt + int64_t(columns[i + l]) * G;
#pragma GCC unroll 2
          for (int h = 0; h < H; ++h) acc[l][h] += (v[i + l] - V{}) * *reinterpret_cast<const Mem*>(x + h * N);
        }
      for (int l = 0; l < PART; ++l)
        for (int h = 0; h < H; ++h) total[part + l][h] += acc[l][h];
    }
  }
  for (int l = 0; l < kLanes; ++l)
    for (int h = 0; h < H; ++h) *reinterpret_cast<Mem*>(sums + int64_t(order[l]) * G + h * N) = total[l][h];
}

#if LF_WIDTH == 16
static_assert(kLanes == W, "a gather brings a lane's column each");
inline __m512i lanes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m512i lanes(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// As slice_rows for few rows, sums[i * SUMS_STRIDE + output]: GATHERS arrays of x, ld floats apart, each of one row
// (floats) or, where PAIRS, of two rows (bf16, the first in the low half).
template <int GATHERS, bool PAIRS, class T, class C>
void slice_gather(const T* values, const C* gaps, int64_t steps, const float* x, int64_t ld, const uint8_t* order, float* sums) {
  constexpr int ROWS = GATHERS * (PAIRS ? 2 : 1), LINE = 64 / kLanes;  // steps of a line of gaps
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  vf total[ROWS] = {}, acc[ROWS];
  __m512i column = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps;) {
    const int64_t stop = steps - s < SPARSE_BLOCK ? steps : s + SPARSE_BLOCK;
    for (int i = 0; i < ROWS; ++i) acc[i] = vf{};
    while (s < stop) {
      fetch_ahead(values + s * kLanes, 64 * int(sizeof(T))), fetch_ahead(gaps + s * kLanes, 64 * int(sizeof(C)));
      const int64_t line = stop - s < LINE ? stop : s + LINE;
      for (; s < line; ++s) {
        const __m512 v = Linear<T>::load(values + s * kLanes);
        const __mmask16 some = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        column = _mm512_add_epi32(column, lanes(gaps + s * kLanes));
#pragma GCC unroll 2
        for (int g = 0; g < GATHERS; ++g) {
          const __m512 got = _mm512_i32gather_ps(column, x + g * ld, 4);
          if constexpr (PAIRS) {
            const __m512i both = _mm512_castps_si512(got);
            acc[2 * g] = _mm512_mask3_fmadd_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), acc[2 * g], some);
            acc[2 * g + 1] = _mm512_mask3_fmadd_ps(v, _mm512_castsi512_ps(_mm512_and_si512(both, high)), acc[2 * g + 1], some);
          } else {
            acc[g] = _mm512_mask3_fmadd_ps(v, got, acc[g], some);
          }
        }
      }
    }
    for (int i = 0; i < ROWS; ++i) total[i] += acc[i];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int l = 0; l < kLanes; ++l) sums[i * SUMS_STRIDE + order[l]] = total[i][l];
}
#endif

// ---- a call ----

// How a group of rows is taken: by gathers, or the lanes of slice_rows.
enum GroupKind { GATHER_ONE = -1, GATHER_TWO = -2, GATHER_PAIR = -3, GATHER_PAIRS = -4, NOTHING = 0, ROWS_4 = 4, ROWS_8 = 8, ROWS_16 = 16, ROWS_32 = 32 };
constexpr int MOST_ROWS = LF_WIDTH == 16 ? 32 : LF_WIDTH;  // of a group: what the registers hold

template <class T>
GroupKind group_kind(int rows) {
#if LF_WIDTH == 16
  constexpr bool pairs = std::is_same_v<T, bf16>;
  if (rows == 1) return GATHER_ONE;
  if (rows == 2) return pairs ? GATHER_PAIR : GATHER_TWO;
  if (rows <= 4 && pairs) return GATHER_PAIRS;
#endif
  return rows <= 4 || W == 4 ? ROWS_4 : rows <= 8 || W == 8 ? ROWS_8 : rows <= 16 ? ROWS_16 : ROWS_32;
}

// Relative time of an entry, for sharing out work.
inline int64_t group_cost(int kind) { return kind == GATHER_ONE || kind == GATHER_PAIR ? 2 : kind < ROWS_32 ? 4 : 6; }

template <class T>
struct SparseCall {
  const SparseDelta<T>& p;
  int64_t slices_per_strip = kStrip / kLanes, strips = (p.y.cols + kStrip - 1) / kStrip;

  int64_t first_slice(int64_t strip) const {
    return strip < strips ? strip * slices_per_strip : num_slices(p.y.cols);
  }
  int64_t entries(int slot, int64_t strip0, int64_t strip1) const {  // with padding
    const PackedSparse& u = p.slots[slot];
    return (u.starts[first_slice(strip1)] - u.starts[first_slice(strip0)]) * kLanes;
  }

  // x of pairs [begin, begin + m) as the kind wants it, and zeros for the column that is nowhere.
  void lay_out(GroupKind kind, int begin, int m, float* xt) const {
    const int64_t cols = p.x.cols;
    const T* x[MOST_ROWS];
    for (int i = 0; i < m; ++i) x[i] = p.x.row(p.routing.rows[begin + i]);
    if (kind == GATHER_ONE || kind == GATHER_TWO) {
      for (int i = 0; i < m; ++i, xt += cols + 1) {
        for (int64_t c = 0; c < cols; c += W) store_part(xt + c, load_part(x[i] + c, cols - c), cols - c);
        xt[cols] = 0.0f;
      }
      return;
    }
    if (kind == GATHER_PAIR || kind == GATHER_PAIRS) {  // bf16: a float is its upper half
      for (int i = 0; i < m; i += 2, xt += cols + 1) {
        const T *low = x[i], *high = x[i + 1 < m ? i + 1 : i];
        for (int64_t c = 0; c < cols; c += W) {
          const vu first = reinterpret_cast<vu>(load_part(low + c, cols - c)), second = reinterpret_cast<vu>(load_part(high + c, cols - c));
          store_part(xt + c, reinterpret_cast<vf>(first >> 16 | second), cols - c);
        }
        xt[cols] = 0.0f;
      }
      return;
    }
    const int g = kind;
    for (int first = 0; first < m; first += W)
      for (int64_t c = 0; c < cols; c += W) {
        const int width = int(cols - c < W ? cols - c : W);
        vf t[W] = {};
        for (int i = 0; i < W && first + i < m; ++i) t[i] = load_part(x[first + i] + c, width);
        transpose(t);
        float* const to = xt + c * g + first;
        if (g >= W) {
          for (int k = 0; k < width; ++k) store_linear(to + k * g, t[k]);
        } else {
          for (int k = 0; k < width; ++k) __builtin_memcpy(to + k * g, &t[k], g * sizeof(float));
        }
      }
    for (int i = 0; i < g; ++i) xt[cols * g + i] = 0.0f;
  }

  // Pairs [begin, begin + m) of a slot, outputs of strips [strip0, strip1).
  void group(int slot, int begin, int m, int64_t strip0, int64_t strip1, float* scratch) const {
    const GroupKind kind = p.slots[slot].values ? group_kind<T>(m) : NOTHING;
    if (strip0 >= strip1) return;
    if (kind) lay_out(kind, begin, m, scratch);
    if (p.slots[slot].wide) strips_of<uint16_t>(kind, slot, begin, m, strip0, strip1, scratch);
    else strips_of<uint8_t>(kind, slot, begin, m, strip0, strip1, scratch);
  }

  template <class C>
  void strips_of(GroupKind kind, int slot, int begin, int m, int64_t strip0, int64_t strip1, const float* xt) const {
    const PackedSparse& u = p.slots[slot];
    constexpr int LD = SUMS_STRIDE;
    const int64_t cols = p.x.cols;
    alignas(64) float sums[(kStrip + 1) * MOST_ROWS], by_row[MOST_ROWS * LD];
    for (int64_t strip = strip0; strip < strip1; ++strip) {
      const int64_t o = strip * kStrip;
      const int width = int(p.y.cols - o < kStrip ? p.y.cols - o : kStrip);
      for (int64_t s = first_slice(strip); kind && s < first_slice(strip + 1); ++s) {
        const T* values = static_cast<const T*>(u.values) + u.starts[s] * kLanes;
        const C* gaps = static_cast<const C*>(u.gaps) + u.starts[s] * kLanes;
        const int64_t steps = u.starts[s + 1] - u.starts[s];
        const uint8_t* order = u.order + s * kLanes;
        switch (kind) {
#if LF_WIDTH == 16
          case GATHER_ONE: slice_gather<1, false>(values, gaps, steps, xt, cols + 1, order, by_row); break;
          case GATHER_TWO: slice_gather<2, false>(values, gaps, steps, xt, cols + 1, order, by_row); break;
          case GATHER_PAIR: slice_gather<1, true>(values, gaps, steps, xt, cols + 1, order, by_row); break;
          case GATHER_PAIRS: slice_gather<2, true>(values, gaps, steps, xt, cols + 1, order, by_row); break;
          case ROWS_32: slice_rows<32>(values, gaps, steps, xt, cols, order, sums); break;
          case ROWS_16: slice_rows<16>(values, gaps, steps, xt, cols, order, sums); break;
#endif
#if LF_WIDTH >= 8
          case ROWS_8: slice_rows<8>(values, gaps, steps, xt, cols, order, sums); break;
#endif
          default: slice_rows<4>(values, gaps, steps, xt, cols, order, sums);
        }
      }
      if (kind >= ROWS_4) rows_of(sums, kind, m, width, by_row, LD);
      for (int i = 0; i < m; ++i) add(slot, begin + i, o, width, kind ? by_row + i * LD : nullptr);
    }
  }

  // by_row[i][o] = sums[o][i]
  static void rows_of(const float* sums, int g, int m, int width, float* by_row, int64_t ld) {
    if (g < W) {
      for (int i = 0; i < m; ++i)
        for (int o = 0; o < width; ++o) by_row[i * ld + o] = sums[o * g + i];
      return;
    }
    for (int first = 0; first < m; first += W)
      for (int o = 0; o < width; o += W) {
        vf t[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) t[k] = *reinterpret_cast<const vf_mem*>(sums + (o + k) * g + first);
        transpose(t);
        for (int i = 0; i < W && first + i < m; ++i) store_linear(by_row + (first + i) * ld + o, t[i]);
      }
  }

  // weight * (sums + bias) into y, or into the row's total where it has several pairs.
  void add(int slot, int pair, int64_t o, int width, const float* sums) const {
    const float* const bias = p.slots[slot].bias;
    const vf weight = splat(p.routing.weights ? p.routing.weights[pair] : 1.0f);
    const int64_t row = p.routing.rows[pair];
    T* const y = p.y.row(row) + o;
    float* const total = p.totals ? p.totals + row * p.y.cols + o : nullptr;
    for (int n = 0; n < width; n += W) {
      const int64_t left = width - n;
      vf sum = {};
      if (sums) sum = load_part(sums + n, left);
      if (bias) sum += load_part(bias + o + n, left);
      if (total) {
        store_part(total + n, load_part(total + n, left) + weight * sum, left);
      } else {
        vf product = {};  // as above: a total that starts at zero, then one rounding into y
        product += weight * sum;
        store_part(y + n, load_part(y + n, left) + product, left);
      }
    }
  }

  bool used(int slot) const { return p.slots[slot].values || p.slots[slot].bias; }

  // f(slot, first pair, pairs) for every group of rows.
  template <class F>
  void groups(const F& f) const {
    for (int s = 0; s < p.routing.num_slots; ++s) {
      if (!used(s)) continue;
      for (int q = p.routing.starts[s]; q < p.routing.starts[s + 1]; q += MOST_ROWS) {
        const int m = p.routing.starts[s + 1] - q < MOST_ROWS ? p.routing.starts[s + 1] - q : MOST_ROWS;
        f(s, q, m);
      }
    }
  }

  // Entries of a strip, as time: some for the outputs themselves.
  int64_t cost(int slot, int m, int64_t strip0, int64_t strip1) const {
    const int64_t outputs = (strip1 - strip0) * kStrip * (1 + m / 2);
    return p.slots[slot].values ? entries(slot, strip0, strip1) * group_cost(group_kind<T>(m)) + outputs : outputs;
  }

  // The strip at which a group has cost `at` behind it.
  int64_t strip_at(int slot, int m, int64_t at) const {
    int64_t lo = 0, hi = strips;  // the smallest strip whose cost reaches it
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (cost(slot, m, 0, mid) >= at) hi = mid;
      else lo = mid + 1;
    }
    return lo;
  }

  // Rows have one pair each: groups one after the other, their outputs too, cut into runs of equal cost.
  void run(int64_t total, int thread, int team) const {
    float* const scratch = scratch_of(thread);
    const int64_t from = total * thread / team, to = total * (thread + 1) / team;
    int64_t seen = 0;
    groups([&](int slot, int begin, int m) {
      const int64_t here = cost(slot, m, 0, strips);
      const int64_t strip0 = seen >= from ? 0 : strip_at(slot, m, from - seen);
      const int64_t strip1 = seen + here <= to ? strips : strip_at(slot, m, to - seen);
      seen += here;
      group(slot, begin, m, strip0, strip1, scratch);
    });
  }

  // Rows with several pairs: a thread owns outputs, sums them up slot by slot and rounds at the end.
  void run_mixed(int thread, int team) const {
    float* const scratch = scratch_of(thread);
    const int64_t strip0 = strips * thread / team, strip1 = strips * (thread + 1) / team;
    groups([&](int slot, int begin, int m) { group(slot, begin, m, strip0, strip1, scratch); });
    const int64_t o0 = strip0 * kStrip, o1 = strip1 * kStrip < p.y.cols ? strip1 * kStrip : p.y.cols;
    for (int64_t row = 0; row < p.y.rows; ++row) {
      if (!has_pair(row)) continue;
      const float* const total = p.totals + row * p.y.cols;
      T* const y = p.y.row(row);
      for (int64_t o = o0; o < o1; o += W)
        store_part(y + o, load_part(y + o, o1 - o) + load_part(total + o, o1 - o), o1 - o);
    }
  }

  bool has_pair(int64_t row) const {  // with a slot that holds something
    for (int q = p.routing.row_starts[row]; q < p.routing.row_starts[row + 1]; ++q) {
      const int pair = p.routing.row_pairs[q];
      int lo = 0, hi = p.routing.num_slots;  // the last slot whose segment starts at or before the pair
      while (hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        (p.routing.starts[mid] <= pair ? lo : hi) = mid;
      }
      if (used(lo)) return true;
    }
    return false;
  }

  float* scratch_of(int thread) const {
    float* const own = p.scratch + thread * p.scratch_floats;
    return own + (16 - (reinterpret_cast<uintptr_t>(own) / 4) % 16) % 16;  // whole cache lines
  }
};

template <class T>
void sparse_delta(const SparseDelta<T>& p) {
  const SparseCall<T> call{p};
  int64_t total = 0;
  call.groups([&](int slot, int, int m) { total += call.cost(slot, m, 0, call.strips); });
  if (total == 0) return;
  parallel(total < PARALLEL_MIN_WORK ? 1 : p.threads, [&](int thread, int team) {
    if (p.totals) call.run_mixed(thread, team);
    else call.run(total, thread, team);
  });
}

#include "sparse_write.inl"

inline void fill_sparse(SparseKernels& table) {
  table = {sparse_delta<float>, sparse_delta<bf16>, sparse_delta<fp16>, sparse_write};
}
