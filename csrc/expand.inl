// y [rows, n0:n1] += h b, fp32 sums, one rounding: the second half of lora.inl, which see.

// y[i][n0 ..] += h[i] b over STEPS steps of columns. The first rows to come by fetch the strip of b after this one, whose
// lines lie a row apart, where no hardware prefetcher looks for them.
template <int M, int STEPS, class T>
void expand_tile(const float* h, int64_t ldh, int rank, const T* b, int64_t ldb, T* const* y, int64_t n0, bool fetch) {
  vf acc[M][2 * STEPS] = {};
  for (int i = 0; i < M; ++i)  // y may lie in another core's cache
    for (int line = 0; line < STEPS * STEP * int(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(y[i] + n0) + line, 1);
  const T* br = b + n0;
  const int64_t ahead = fetch ? STEPS * STEP : 0;
  for (int r = 0; r < rank; ++r, br += ldb) {
    if (ahead)
      for (int line = 0; line < STEPS * STEP * int(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(br + ahead) + line);
    vf bv[2 * STEPS];
    for (int s = 0; s < STEPS; ++s) {
      bv[2 * s] = Elem<T>::template load<0>(br + s * STEP);
      bv[2 * s + 1] = Elem<T>::template load<1>(br + s * STEP);
    }
    for (int i = 0; i < M; ++i) {
      const vf hv = splat(h[i * ldh + r]);
      for (int v = 0; v < 2 * STEPS; ++v) acc[i][v] += hv * bv[v];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int s = 0; s < STEPS; ++s) {
      T* const p = y[i] + n0 + s * STEP;
      Elem<T>::store(p, Elem<T>::template load<0>(p) + acc[i][2 * s], Elem<T>::template load<1>(p) + acc[i][2 * s + 1]);
    }
}

// The last columns, fewer than a step: through padded copies, so that the arithmetic stays the same.
template <class T>
void expand_tail(const float* h, int64_t ldh, int m, int rank, const T* b, int64_t ldb, T* const* y, int64_t n0, int64_t n1) {
  const int64_t bytes = (n1 - n0) * sizeof(T);
  for (int i = 0; i < m; ++i) {
    vf acc0 = {}, acc1 = {};
    for (int r = 0; r < rank; ++r) {
      T bt[STEP] = {};
      __builtin_memcpy(bt, b + r * ldb + n0, bytes);
      const vf hv = splat(h[i * ldh + r]);
      acc0 += hv * Elem<T>::template load<0>(bt);
      acc1 += hv * Elem<T>::template load<1>(bt);
    }
    T yt[STEP] = {};
    __builtin_memcpy(yt, y[i] + n0, bytes);
    Elem<T>::store(yt, Elem<T>::template load<0>(yt) + acc0, Elem<T>::template load<1>(yt) + acc1);
    __builtin_memcpy(y[i] + n0, yt, bytes);
  }
}

template <int M, int STEPS, class T>
void expand_rows(int m, const float* h, int64_t ldh, int rank, const T* b, int64_t ldb, T* const* y, int64_t n0, bool fetch) {
  if constexpr (M > 1)
    if (m < M) return expand_rows<M - 1, STEPS>(m, h, ldh, rank, b, ldb, y, n0, fetch);
  expand_tile<M, STEPS>(h, ldh, rank, b, ldb, y, n0, fetch);
}

// One or two rows: walk whole rank rows four at a time, the sums waiting in L1. The order of each sum is that of the tiles.
template <class T>
void expand_axpy(const float* h, int rank, const T* b, int64_t ldb, T* y, int64_t n0, int64_t n1) {
  vf acc[2 * AXPY_STEPS];
  for (; n0 + STEP <= n1;) {
    const int steps = (n1 - n0) / STEP < AXPY_STEPS ? int((n1 - n0) / STEP) : AXPY_STEPS;
    for (int v = 0; v < 2 * steps; ++v) acc[v] = vf{};
    int r = 0;
    for (; r + 4 <= rank; r += 4) {
      const T* const p = b + r * ldb + n0;
      const vf h0 = splat(h[r]), h1 = splat(h[r + 1]), h2 = splat(h[r + 2]), h3 = splat(h[r + 3]);
      const int64_t next = short_rows<T>(ldb) && r + 8 <= rank ? 4 * ldb : 0;
      for (int s = 0; s < steps; ++s) {
        const T* const q = p + s * STEP;
        if (next)
          for (int i = 0; i < 4; ++i)
            for (int line = 0; line < STEP * int(sizeof(T)); line += 64)
              __builtin_prefetch(reinterpret_cast<const char*>(q + next + i * ldb) + line);
        vf e = acc[2 * s] + h0 * Elem<T>::template load<0>(q), o = acc[2 * s + 1] + h0 * Elem<T>::template load<1>(q);
        e += h1 * Elem<T>::template load<0>(q + ldb), o += h1 * Elem<T>::template load<1>(q + ldb);
        e += h2 * Elem<T>::template load<0>(q + 2 * ldb), o += h2 * Elem<T>::template load<1>(q + 2 * ldb);
        acc[2 * s] = e + h3 * Elem<T>::template load<0>(q + 3 * ldb);
        acc[2 * s + 1] = o + h3 * Elem<T>::template load<1>(q + 3 * ldb);
      }
    }
    for (; r < rank; ++r) {
      const T* const p = b + r * ldb + n0;
      const vf hv = splat(h[r]);
      for (int s = 0; s < steps; ++s) {
        acc[2 * s] += hv * Elem<T>::template load<0>(p + s * STEP);
        acc[2 * s + 1] += hv * Elem<T>::template load<1>(p + s * STEP);
      }
    }
    for (int s = 0; s < steps; ++s) {
      T* const p = y + n0 + s * STEP;
      Elem<T>::store(p, Elem<T>::template load<0>(p) + acc[2 * s], Elem<T>::template load<1>(p) + acc[2 * s + 1]);
    }
    n0 += steps * STEP;
  }
}

template <class T>
void expand_block(const float* h, int64_t ldh, int m, int rank, const T* b, int64_t ldb, T* const* y, int64_t n0, int64_t n1) {
  int64_t n = n0;
  if (m <= AXPY_ROWS) {
    for (int i = 0; i < m; ++i) expand_axpy(h + i * ldh, rank, b, ldb, y[i], n0, n1);
    n = n0 + (n1 - n0) / STEP * STEP;
  } else {
    for (; n + EXPAND_STEPS * STEP <= n1; n += EXPAND_STEPS * STEP)
      for (int i = 0; i < m; i += MR)
        expand_rows<MR, EXPAND_STEPS>(m - i < MR ? m - i : MR, h + i * ldh, ldh, rank, b, ldb, y + i, n,
                                      i == 0 && n + EXPAND_STEPS * STEP < n1);
    for (; n + STEP <= n1; n += STEP)
      for (int i = 0; i < m; i += MR)
        expand_rows<MR, 1>(m - i < MR ? m - i : MR, h + i * ldh, ldh, rank, b, ldb, y + i, n, false);
  }
  if (n < n1) expand_tail(h, ldh, m, rank, b, ldb, y, n, n1);
}

// y [m, n0:n1] += h [m, rank] b [rank, n0:n1]; n0 is a multiple of STEP.
template <class T>
void expand(const float* h, int64_t ldh, int m, int rank, const T* b, int64_t ldb, T* const* y, int64_t n0, int64_t n1) {
  for (int i = 0; i < m; i += EXPAND_ROWS)
    expand_block(h + i * ldh, ldh, m - i < EXPAND_ROWS ? m - i : EXPAND_ROWS, rank, b, ldb, y + i, n0, n1);
}
