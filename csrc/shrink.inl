// h [rows, rank] = x a^T, fp32 sums: the first half of lora.inl, which see.

template <class T>
struct Dot {  // acc += x . a over one step
  static constexpr bool TILES = false;
  template <int M, int N>
  static inline __attribute__((always_inline)) void step(vf (&acc)[M][N], const T* const* x, const T* const* a, int64_t k) {
    half<0>(acc, x, a, k);
    half<1>(acc, x, a, k);
  }
  template <int HALF, int M, int N>
  static inline __attribute__((always_inline)) void half(vf (&acc)[M][N], const T* const* x, const T* const* a, int64_t k) {
    vf av[N];
    for (int j = 0; j < N; ++j) av[j] = Elem<T>::template load<HALF>(a[j] + k);
    for (int i = 0; i < M; ++i) {
      const vf xv = Elem<T>::template load<HALF>(x[i] + k);
      for (int j = 0; j < N; ++j) acc[i][j] += xv * av[j];
    }
  }
};

#ifdef LF_BF16_DOT
template <>
struct Dot<bf16> {
  static constexpr bool TILES = true;  // where the CPU has them
  template <int M, int N>
  static inline __attribute__((always_inline)) void step(vf (&acc)[M][N], const bf16* const* x, const bf16* const* a, int64_t k) {
    __m512bh av[N];
    for (int j = 0; j < N; ++j) av[j] = (__m512bh)_mm512_loadu_si512(a[j] + k);
    for (int i = 0; i < M; ++i) {
      const __m512bh xv = (__m512bh)_mm512_loadu_si512(x[i] + k);
      for (int j = 0; j < N; ++j) acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], xv, av[j]);
    }
  }
};
#endif

// h[i * ldh + j] (+)= dot over [k0, k1) of x[i] and rank row j of a. With `fetch`, the N rank rows after these are asked for.
template <int M, int N, class T>
void dot_tile(const T* const* x, const T* a, int64_t lda, int64_t k0, int64_t k1, float* h, int64_t ldh, bool add, bool fetch) {
  vf acc[M][N] = {};
  const T* ar[N];
  for (int j = 0; j < N; ++j) ar[j] = a + j * lda;
  int64_t k = k0;
  if (fetch) {
    for (; k + STEP <= k1; k += STEP) {
      for (int j = 0; j < N; ++j)
        for (int line = 0; line < STEP * int(sizeof(T)); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(ar[j] + N * lda + k) + line);
      Dot<T>::step(acc, x, ar, k);
    }
  }
  for (; k + STEP <= k1; k += STEP) Dot<T>::step(acc, x, ar, k);
  if (k < k1) {  // the last partial step, padded with zeros
    T xt[M][STEP] = {}, at[N][STEP] = {};
    const T *xp[M], *ap[N];
    for (int i = 0; i < M; ++i) __builtin_memcpy(xt[i], x[i] + k, (k1 - k) * sizeof(T)), xp[i] = xt[i];
    for (int j = 0; j < N; ++j) __builtin_memcpy(at[j], ar[j] + k, (k1 - k) * sizeof(T)), ap[j] = at[j];
    Dot<T>::step(acc, xp, ap, 0);
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; j += 4) {
      const vf zero = {};
      const vf s = sum4(acc[i][j], j + 1 < N ? acc[i][j + 1 < N ? j + 1 : j] : zero,
                        j + 2 < N ? acc[i][j + 2 < N ? j + 2 : j] : zero,
                        j + 3 < N ? acc[i][j + 3 < N ? j + 3 : j] : zero);
      for (int q = 0; q < 4 && j + q < N; ++q) {
        float* const at = h + i * ldh + j + q;
        *at = add ? *at + s[q * (W / 4)] : s[q * (W / 4)];
      }
    }
}

// `after`: rank rows from a's first on that are worth fetching ahead, 0 for none.
template <int M, class T>
void dot_rows(const T* const* x, const T* a, int64_t lda, int rank, int64_t k0, int64_t k1, float* h, int64_t ldh, bool add,
              int after) {
  int j = 0;
  if constexpr (M == 1)
    for (; j + 8 <= rank; j += 8) dot_tile<1, 8>(x, a + j * lda, lda, k0, k1, h + j, ldh, add, short_rows<T>(lda) && j + 16 <= after);
  for (; j + NR <= rank; j += NR)
    dot_tile<M, NR>(x, a + j * lda, lda, k0, k1, h + j, ldh, add, j + 2 * NR <= after);
  for (; j < rank; ++j) dot_tile<M, 1>(x, a + j * lda, lda, k0, k1, h + j, ldh, add, false);
}

// As many rows as are left, MR at most.
template <int M, class T>
void dot_rows_at_most(int m, const T* const* x, const T* a, int64_t lda, int rank, int64_t k0, int64_t k1, float* h,
                      int64_t ldh, bool add, int after) {
  if constexpr (M > 1)
    if (m < M) return dot_rows_at_most<M - 1>(m, x, a, lda, rank, k0, k1, h, ldh, add, after);
  dot_rows<M>(x, a, lda, rank, k0, k1, h, ldh, add, after);
}

// h [m, rank] = x [m, k] a^T [k, rank]
template <class T>
void shrink(const T* const* x, int m, int64_t k, const T* a, int64_t lda, int rank, float* h, int64_t ldh) {
  const auto cut = [&](int i, int j, int n, int64_t k0) {
    dot_rows_at_most<MR>(m - i < MR ? m - i : MR, x + i, a + j * lda, lda, n, k0, k0 + K_BLOCK < k ? k0 + K_BLOCK : k,
                         h + i * ldh + j, ldh, k0 > 0, i == 0 ? rank - j : 0);
  };
  if (m <= MR) {  // one tile of rows: stream the rank rows, a few at a time, from end to end
    const int n = m == 1 ? 8 : NR;
    for (int j = 0; j < rank; j += n)
      for (int64_t k0 = 0; k0 < k; k0 += K_BLOCK) cut(0, j, rank - j < n ? rank - j : n, k0);
    return;
  }
  for (int64_t k0 = 0; k0 < k; k0 += K_BLOCK)
    for (int i = 0; i < m; i += MR) cut(i, 0, rank, k0);
}
