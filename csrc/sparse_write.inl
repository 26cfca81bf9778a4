// saved = weight[kept]; weight[kept] = values: one pass over the kept places, rows shared out over the threads.

constexpr int64_t WRITE_MIN_WORK = 16 * 1024;  // entries below which a second thread does not pay

template <class E>
inline __attribute__((always_inline)) void exchange(E* place, const E* values, E* saved, int64_t i) {
  if (saved) saved[i] = *place;
  if (values) *place = values[i];
}

// E: an unsigned integer as wide as the element.
template <class E, class C>
void write_columns(const SparseWrite& p, int64_t row0, int64_t row1) {
  constexpr int64_t AHEAD = 24;  // entries: each may lie on a line of its own
  const C* const columns = static_cast<const C*>(p.at.columns);
  const E* const values = static_cast<const E*>(p.values);
  E* const saved = static_cast<E*>(p.saved);
  for (int64_t r = row0; r < row1; ++r) {
    E* const row = static_cast<E*>(p.weight) + r * p.at.cols;
    const int64_t end = p.at.starts[r + 1], last = p.at.starts[row1];
    for (int64_t i = p.at.starts[r]; i < end; ++i) {
      if (i + AHEAD < last) __builtin_prefetch(row + (i + AHEAD < end ? 0 : p.at.cols) + uint32_t(columns[i + AHEAD]), 1);
      exchange(row + uint32_t(columns[i]), values, saved, i);
    }
  }
}

template <class E>
void write_bitmap(const SparseWrite& p, int64_t row0, int64_t row1) {
  const E* const values = static_cast<const E*>(p.values);
  E* const saved = static_cast<E*>(p.saved);
  for (int64_t r = row0; r < row1; ++r) {
    E* const row = static_cast<E*>(p.weight) + r * p.at.cols;
    const uint8_t* const bits = p.at.bitmap + r * p.at.bitmap_stride;
    int64_t i = p.at.starts[r];
    for (int64_t c = 0; c < p.at.cols; c += 64) {
      uint64_t word = 0;
      for (int b = 0; b < 8; ++b) word |= uint64_t(bits[c / 8 + b]) << (8 * b);
      for (; word; word &= word - 1, ++i) exchange(row + c + __builtin_ctzll(word), values, saved, i);
    }
  }
}

template <class E>
void write_rows(const SparseWrite& p, int64_t row0, int64_t row1) {
  if (p.at.bitmap) write_bitmap<E>(p, row0, row1);
  else if (p.at.wide) write_columns<E, int32_t>(p, row0, row1);
  else write_columns<E, uint16_t>(p, row0, row1);
}

inline void sparse_write(const SparseWrite& p) {
  const int64_t entries = p.at.starts[p.at.rows];
  parallel(entries < WRITE_MIN_WORK ? 1 : p.threads, [&](int thread, int team) {
    const int64_t row0 = p.at.rows * thread / team, row1 = p.at.rows * (thread + 1) / team;
    if (p.size == 2) write_rows<uint16_t>(p, row0, row1);
    else if (p.size == 4) write_rows<uint32_t>(p, row0, row1);
    else write_rows<uint64_t>(p, row0, row1);
  });
}
