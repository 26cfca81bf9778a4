// saved = weight[kept]; weight[kept] = values, of many weights: one pass over the kept places, rows shared out over threads.

constexpr int64_t WRITE_MIN_WORK = 16 * 1024;  // entries below which a second thread does not pay

template <class E>
inline __attribute__((always_inline)) void exchange(E* place, const E* values, E* saved, int64_t i) {
  if (saved) saved[i] = *place;
  if (values) *place = values[i];
}

// E: an unsigned integer as wide as the element.
template <class E, class C>
void write_columns(const SparseWrite& p, int64_t row0, int64_t row1) {
  constexpr int64_t AHEAD = 32;  // entries: each may lie on a line of its own
  const C* const columns = static_cast<const C*>(p.at.columns);
  const E* const values = static_cast<const E*>(p.values);
  E* const saved = static_cast<E*>(p.saved);
  E* const weight = static_cast<E*>(p.weight);
  const int64_t last = p.at.starts[row1];
  int64_t fetched = row0;  // the row of the entry that is fetched
  for (int64_t r = row0; r < row1; ++r)
    for (int64_t i = p.at.starts[r]; i < p.at.starts[r + 1]; ++i) {
      if (i + AHEAD < last) {
        while (p.at.starts[fetched + 1] <= i + AHEAD) ++fetched;
        __builtin_prefetch(weight + fetched * p.at.cols + uint32_t(columns[i + AHEAD]), 1);
      }
      exchange(weight + r * p.at.cols + uint32_t(columns[i]), values, saved, i);
    }
}

// Columns [c, cols) of a row by their bits, entries from i on; the place after the last.
template <class E>
int64_t write_bits(const uint8_t* bits, E* row, int64_t c, int64_t cols, const E* values, E* saved, int64_t i) {
  for (; c < cols; c += 64) {
    uint64_t word;
    __builtin_memcpy(&word, bits + c / 8, 8);
    for (; word; word &= word - 1, ++i) exchange(row + c + __builtin_ctzll(word), values, saved, i);
  }
  return i;
}

#if LF_WIDTH == 16
// Whole vectors of a row: kept entries are compressed out and values expanded in. c: where the next column is.
inline int64_t write_vectors(const uint8_t* bits, uint32_t* row, int64_t* c, int64_t cols, const uint32_t* values, uint32_t* saved, int64_t i) {
  for (; *c + 64 <= cols; *c += 64)
    for (int part = 0; part < 64; part += 16) {
      uint16_t mask;
      __builtin_memcpy(&mask, bits + (*c + part) / 8, 2);
      uint32_t* const at = row + *c + part;
      const int kept = __builtin_popcount(mask);
      const __m512i w = _mm512_loadu_si512(at);
      const __mmask16 low = __mmask16((1u << kept) - 1);
      if (saved) _mm512_mask_storeu_epi32(saved + i, low, _mm512_maskz_compress_epi32(mask, w));
      if (values) _mm512_storeu_si512(at, _mm512_mask_expandloadu_epi32(w, mask, values + i));
      i += kept;
    }
  return i;
}

__attribute__((target("avx512vbmi2"))) inline int64_t write_vectors(const uint8_t* bits, uint16_t* row, int64_t* c, int64_t cols,
                                                                     const uint16_t* values, uint16_t* saved, int64_t i) {
  for (; *c + 64 <= cols; *c += 64)
    for (int part = 0; part < 64; part += 32) {
      uint32_t mask;
      __builtin_memcpy(&mask, bits + (*c + part) / 8, 4);
      uint16_t* const at = row + *c + part;
      const int kept = __builtin_popcount(mask);
      const __m512i w = _mm512_loadu_si512(at);
      const __mmask32 low = __mmask32((uint64_t(1) << kept) - 1);
      if (saved) _mm512_mask_storeu_epi16(saved + i, low, _mm512_maskz_compress_epi16(mask, w));
      if (values) _mm512_storeu_si512(at, _mm512_mask_expandloadu_epi16(w, mask, values + i));
      i += kept;
    }
  return i;
}

inline int64_t write_vectors(const uint8_t*, uint64_t*, int64_t*, int64_t, const uint64_t*, uint64_t*, int64_t i) { return i; }

inline bool has_vbmi2() {
  static const bool has = __builtin_cpu_supports("avx512vbmi2") != 0;
  return has;
}
#endif

template <class E>
void write_bitmap(const SparseWrite& p, int64_t row0, int64_t row1) {
  const E* const values = static_cast<const E*>(p.values);
  E* const saved = static_cast<E*>(p.saved);
  for (int64_t r = row0; r < row1; ++r) {
    E* const row = static_cast<E*>(p.weight) + r * p.at.cols;
    const uint8_t* const bits = p.at.bitmap + r * p.at.bitmap_stride;
    int64_t i = p.at.starts[r], c = 0;
#if LF_WIDTH == 16
    if (sizeof(E) == 4 || has_vbmi2()) i = write_vectors(bits, row, &c, p.at.cols, values, saved, i);
#endif
    write_bits(bits, row, c, p.at.cols, values, saved, i);
  }
}

template <class E>
void write_rows(const SparseWrite& p, int64_t row0, int64_t row1) {
  if (p.at.bitmap) write_bitmap<E>(p, row0, row1);
  else if (p.at.wide) write_columns<E, int32_t>(p, row0, row1);
  else write_columns<E, uint16_t>(p, row0, row1);
}

// The row at which `at` entries of a matrix lie behind.
inline int64_t row_after(const SparseView& m, int64_t at) { return std::lower_bound(m.starts, m.starts + m.rows, at) - m.starts; }

inline void sparse_write(const SparseWrite* writes, int64_t count, int threads) {
  int64_t entries = 0;
  for (int64_t w = 0; w < count; ++w) entries += writes[w].at.starts[writes[w].at.rows];
  parallel(entries < WRITE_MIN_WORK ? 1 : threads, [&](int thread, int team) {
    const int64_t from = entries * thread / team, to = entries * (thread + 1) / team;
    int64_t seen = 0;
    for (int64_t w = 0; w < count && seen < to; ++w) {
      const SparseWrite& p = writes[w];
      const int64_t here = p.at.starts[p.at.rows];
      const int64_t row0 = from <= seen ? 0 : row_after(p.at, std::min(from - seen, here));
      const int64_t row1 = to >= seen + here ? p.at.rows : row_after(p.at, to - seen);
      seen += here;
      if (row0 >= row1) continue;
      if (p.size == 2) write_rows<uint16_t>(p, row0, row1);
      else if (p.size == 4) write_rows<uint32_t>(p, row0, row1);
      else write_rows<uint64_t>(p, row0, row1);
    }
  });
}
