// The bf16 tile path of one adapter's rows, 16 or more of them: the same sums as lora.inl on AMX tiles.
//
//   shrink  h [16 rows, 16 ranks] += x [16, 32] . a^T [32, 16]         tdpbf16ps, fp32 sums
//   expand  y [16 rows, 16 cols]  += [hi | lo] [16, 32] . [b; b] [32, 16]
//
// The intermediate goes in as hi + lo, two bf16 that together carry 16 bits of its mantissa; a tile takes 16 ranks of both,
// against the same 16 rank rows twice. A and B are packed into the tiles' pair layout as they are used, a block of rows
// (up to 256) paying for each packing. Why not keep them packed in the pool: few-row calls, the common case of decoding,
// stream the plain rows at full bandwidth, and one layout serves every instruction set.
//
// Tile sums run in another order than vector dots, so a bf16 row's last bit may depend on whether its adapter has
// AMX_MIN_ROWS rows in the batch, and on whether any row of the batch has several pairs (then all go without tiles); on
// nothing else: a row of a tile does not see its neighbours.

constexpr int AMX_MIN_ROWS = 16, AMX_MAX_RANK = 512;
constexpr int AMX_K = 512;        // in_features packed at a time
constexpr int AMX_RANKS = 64;     // ranks packed at a time: 64 KB of packed A
constexpr int AMX_STRIPS = 16;    // 32-column strips x rank tiles packed at a time: 32 KB of packed B

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Own spellings, because the compiler's intrinsics for tile loads do not say that they read memory.
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {  // C += A . B
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// dst [16][16 pairs]: dst[c][i] = pair c of row i, from 16 rows of 16 pairs. Four rounds of 4 x 4 shuffles.
inline void transpose_pairs(const __m512i (&in)[16], bf16* dst) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // u[4 g + j] holds, in lane l, pair 4 l + j of rows 4 g .. 4 g + 3
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    _mm512_store_si512(dst + (0 + j) * 32, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_store_si512(dst + (4 + j) * 32, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_store_si512(dst + (8 + j) * 32, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_store_si512(dst + (12 + j) * 32, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

inline __mmask32 first(int64_t n) { return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }

// packed: tiles [rank tile][k step][16][32], zeros beyond the ranks and features there are.
inline void pack_a(const bf16* a, int64_t lda, int ranks, int64_t k, int steps, bf16* packed) {
  for (int rt = 0; rt * 16 < ranks; ++rt)
    for (int s = 0; s < steps; ++s) {
      const __mmask32 mask = first(k - s * 32);
      __m512i rows[16];
      for (int i = 16; i < 32 && rt * 16 + i < ranks; ++i) __builtin_prefetch(a + (rt * 16 + i) * lda + s * 32);
      for (int i = 0; i < 16; ++i)
        rows[i] = rt * 16 + i < ranks ? _mm512_maskz_loadu_epi16(mask, a + (rt * 16 + i) * lda + s * 32) : __m512i{};
      transpose_pairs(rows, packed + (rt * steps + s) * 512);
    }
}

// h [m, ldh] = x a^T for ranks [r0, r0 + ranks); m rows padded to 16, ldh a multiple of 16.
inline void amx_shrink(const bf16* const* x, int m, int64_t k, const bf16* a, int64_t lda, int rank, float* h, int ldh) {
  alignas(64) bf16 packed[AMX_RANKS * AMX_K], xt[16 * AMX_K];
  for (int r0 = 0; r0 < rank; r0 += AMX_RANKS) {
    const int ranks = rank - r0 < AMX_RANKS ? rank - r0 : AMX_RANKS, tiles = (ranks + 15) / 16;
    for (int64_t k0 = 0; k0 < k; k0 += AMX_K) {
      const int64_t kn = k - k0 < AMX_K ? k - k0 : AMX_K;
      const int steps = int((kn + 31) / 32);
      pack_a(a + r0 * lda + k0, lda, ranks, kn, steps, packed);
      for (int i = 0; i < m; i += 16) {
        // Sixteen rows at one stride are read where they lie, others are copied side by side.
        const bf16* src = x[i] + k0;
        int64_t stride = i + 1 < m ? x[i + 1] - x[i] : 0;
        bool direct = i + 16 <= m && kn % 32 == 0;
        for (int j = 2; direct && j < 16; ++j) direct = x[i + j] - x[i + j - 1] == stride;
        if (!direct) {
          for (int j = 0; j < 16; ++j)
            for (int s = 0; s < steps; ++s)
              _mm512_store_si512(xt + j * AMX_K + s * 32,
                                 i + j < m ? _mm512_maskz_loadu_epi16(first(kn - s * 32), x[i + j] + k0 + s * 32) : __m512i{});
          src = xt, stride = AMX_K;
        }
        stride *= sizeof(bf16);
        float* const hi = h + i * ldh + r0;
        const int64_t hs = int64_t(ldh) * 4;
        if (k0 == 0) {
          tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        } else {
          tile_load<0>(hi, hs);
          if (tiles > 1) tile_load<1>(hi + 16, hs);
          if (tiles > 2) tile_load<2>(hi + 32, hs);
          if (tiles > 3) tile_load<3>(hi + 48, hs);
        }
        const int64_t next = int64_t(steps) * 512;
        for (int s = 0; s < steps; ++s) {
          const bf16* const p = packed + s * 512;
          tile_load<4>(src + s * 32, stride);
          tile_load<5>(p, 64);
          tile_dot<0, 4, 5>();
          if (tiles > 1) tile_load<6>(p + next, 64), tile_dot<1, 4, 6>();
          if (tiles > 2) tile_load<7>(p + 2 * next, 64), tile_dot<2, 4, 7>();
          if (tiles > 3) tile_load<5>(p + 3 * next, 64), tile_dot<3, 4, 5>();
        }
        tile_store<0>(hi, hs);
        if (tiles > 1) tile_store<1>(hi + 16, hs);
        if (tiles > 2) tile_store<2>(hi + 32, hs);
        if (tiles > 3) tile_store<3>(hi + 48, hs);
      }
    }
  }
}

// split [rank tile][m][32]: 16 ranks of hi, then the same 16 of lo.
inline void split_h(const float* h, int ldh, int m, int tiles, const float* factor, bf16* split) {
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < m; ++i) {
      const __m512 v = _mm512_mul_ps(_mm512_load_ps(h + i * ldh + t * 16), _mm512_set1_ps(factor[i]));
      const __m256bh hi = _mm512_cvtneps_pbh(v);
      const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)hi), 16));
      bf16* const dst = split + (t * m + i) * 32;
      _mm256_store_si256(reinterpret_cast<__m256i*>(dst), (__m256i)hi);
      _mm256_store_si256(reinterpret_cast<__m256i*>(dst + 16), (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, back)));
    }
}

// packed: tiles [32-column strip][rank tile][column half][16][32]; rows 8 .. 15 of a tile repeat rows 0 .. 7.
// A strip's halves hold columns 0-3, 8-11, 16-19, 24-27 and the others: the order that unpacking 16-bit lanes gives.
inline void pack_b(const bf16* b, int64_t ldb, int rank, int tiles, int64_t cols, bf16* packed) {
  constexpr int AHEAD = 2;  // strips
  for (int c = 0; c * 32 < cols; ++c)
    for (int t = 0; t < tiles; ++t) {
      bf16* const dst = packed + (c * tiles + t) * 1024;
      const __mmask32 mask = first(cols - c * 32);
      for (int i = 0; i < 8; ++i) {
        const int r = t * 16 + 2 * i;
        __builtin_prefetch(b + r * ldb + (c + AHEAD) * 32), __builtin_prefetch(b + (r + 1) * ldb + (c + AHEAD) * 32);
        const __m512i even = r < rank ? _mm512_maskz_loadu_epi16(mask, b + r * ldb + c * 32) : __m512i{};
        const __m512i odd = r + 1 < rank ? _mm512_maskz_loadu_epi16(mask, b + (r + 1) * ldb + c * 32) : __m512i{};
        const __m512i lo = _mm512_unpacklo_epi16(even, odd), hi = _mm512_unpackhi_epi16(even, odd);
        _mm512_store_si512(dst + i * 32, lo), _mm512_store_si512(dst + (i + 8) * 32, lo);
        _mm512_store_si512(dst + 512 + i * 32, hi), _mm512_store_si512(dst + 512 + (i + 8) * 32, hi);
      }
    }
}

// y[i][0:32] += sums, in the packed column order
inline void add_sums(bf16* y, __mmask32 mask, const float* lo, const float* hi) {
  const __m512i old = _mm512_maskz_loadu_epi16(mask, y), zero = {};
  const vf v0 = reinterpret_cast<vf>(_mm512_unpacklo_epi16(zero, old)) + *reinterpret_cast<const vf*>(lo);
  const vf v1 = reinterpret_cast<vf>(_mm512_unpackhi_epi16(zero, old)) + *reinterpret_cast<const vf*>(hi);
  const __m512i r0 = (__m512i)(Elem<bf16>::rounded(v0) >> 16), r1 = (__m512i)(Elem<bf16>::rounded(v1) >> 16);
  _mm512_mask_storeu_epi16(y, mask, _mm512_packus_epi32(r0, r1));
}

// y [m, n] += split b; mp = m padded to 16
inline void amx_expand(const bf16* split, int m, int mp, int rank, const bf16* b, int64_t ldb, bf16* const* y, int64_t n) {
  const int tiles = (rank + 15) / 16;
  alignas(64) bf16 packed[(AMX_MAX_RANK / 16 > AMX_STRIPS ? AMX_MAX_RANK / 16 : AMX_STRIPS) * 1024];
  alignas(64) float sums[4][256];
  const int64_t cols = (tiles < AMX_STRIPS ? AMX_STRIPS / tiles : 1) * 32;
  for (int64_t n0 = 0; n0 < n; n0 += cols) {
    const int64_t width = n - n0 < cols ? n - n0 : cols;
    pack_b(b + n0, ldb, rank, tiles, width, packed);
    for (int i = 0; i < mp; i += 32) {
      const bool two = i + 16 < mp;
      for (int j = i + 32; j < i + 64 && j < m; ++j)  // the rows after these, while the tiles work
        for (int64_t c = 0; c < width; c += 32) __builtin_prefetch(y[j] + n0 + c, 1);
      for (int64_t c = 0; c < width; c += 32) {
        const bf16* const strip = packed + (c / 32) * tiles * 1024;
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (int t = 0; t < tiles; ++t) {
          const bf16* const h = split + (t * mp + i) * 32;
          tile_load<4>(h, 64);
          tile_load<6>(strip + t * 1024, 64);
          tile_load<7>(strip + t * 1024 + 512, 64);
          tile_dot<0, 4, 6>();
          tile_dot<1, 4, 7>();
          if (two) {
            tile_load<5>(h + 512, 64);
            tile_dot<2, 5, 6>();
            tile_dot<3, 5, 7>();
          }
        }
        tile_store<0>(sums[0], 64);
        tile_store<1>(sums[1], 64);
        if (two) tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
        const __mmask32 mask = first(width - c);
        for (int j = 0; j < 32 && i + j < m; ++j) {
          const int q = j < 16 ? 0 : 2;
          add_sums(y[i + j] + n0 + c, mask, sums[q] + (j & 15) * 16, sums[q + 1] + (j & 15) * 16);
        }
      }
    }
  }
}

constexpr int AMX_BLOCK_ROWS = 256;

// Pairs [begin, end) of one slot, unique rows.
inline void amx_rows(const MultiLora<bf16>& p, int slot, int begin, int end) {
  alignas(64) float h[H_FLOATS];
  alignas(64) bf16 split[2 * H_FLOATS];
  const bf16* x[AMX_BLOCK_ROWS];
  bf16* y[AMX_BLOCK_ROWS];
  float factor[AMX_BLOCK_ROWS];
  const int rank = p.slot_rank[slot], ldh = round_up(rank, 16);
  const int block = H_FLOATS / ldh < AMX_BLOCK_ROWS ? H_FLOATS / ldh / 16 * 16 : AMX_BLOCK_ROWS;
  const bf16 *a = p.a.row(int64_t(slot) * p.max_rank), *b = p.b.row(int64_t(slot) * p.max_rank);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (; begin < end; begin += block) {
    const int m = end - begin < block ? end - begin : block, mp = round_up(m, 16);
    for (int i = 0; i < m; ++i) {
      const int row = p.routing.rows[begin + i];
      x[i] = p.x.row(row), y[i] = p.y.row(row);
      factor[i] = p.routing.weights ? p.slot_scaling[slot] * p.routing.weights[begin + i] : p.slot_scaling[slot];
    }
    for (int i = m; i < mp; ++i) factor[i] = 0;
    amx_shrink(x, m, p.x.cols, a, p.a.stride, rank, h, ldh);
    split_h(h, ldh, mp, ldh / 16, factor, split);
    amx_expand(split, m, mp, rank, b, p.b.stride, y, p.y.cols);
  }
  _tile_release();
}

// Whether some slot's rows are the tiles'.
inline bool amx_any(const MultiLora<bf16>& p) {
  bool any = false;
  for (int s = 0; s < p.routing.num_slots; ++s)
    any |= p.routing.starts[s + 1] - p.routing.starts[s] >= AMX_MIN_ROWS && p.slot_rank[s] <= AMX_MAX_RANK;
  return any;
}

// The slot, if all pairs are one slot's, as many as a tile pays for, and it has rank tiles for every thread: split by
// rows, each thread would pack all of A and B. -1 otherwise.
inline int amx_one_slot(const MultiLora<bf16>& p, int threads) {
  const RoutingView& route = p.routing;
  if (threads == 1 || route.row_starts || route.num_pairs < AMX_MIN_ROWS || route.num_pairs > AMX_BLOCK_ROWS) return -1;
  int slot = 0;
  while (route.starts[slot + 1] == 0) ++slot;
  const int rank = p.slot_rank[slot];
  const bool all = route.starts[slot + 1] == route.num_pairs;
  return all && rank > 16 * (threads - 1) && rank <= AMX_MAX_RANK && round_up(route.num_pairs, 16) * round_up(rank, 16) <= H_FLOATS ? slot : -1;
}

// All pairs, one slot: the team shares the rank tiles of the shrink, then the columns of the expand, so that each part of
// A and B is packed once. h: [rows padded to 16, rank padded to 16].
inline void amx_shared(const MultiLora<bf16>& p, int slot, float* h, int thread, int threads) {
  alignas(64) bf16 split[2 * H_FLOATS];
  const bf16* x[AMX_BLOCK_ROWS];
  bf16* y[AMX_BLOCK_ROWS];
  float factor[AMX_BLOCK_ROWS] = {};
  const int m = p.routing.num_pairs, mp = round_up(m, 16), rank = p.slot_rank[slot], ldh = round_up(rank, 16);
  const int strips = int((p.y.cols + 31) / 32), n0 = strips * thread / threads * 32;
  const int64_t n1 = strips * (thread + 1) / threads * 32 < p.y.cols ? strips * (thread + 1) / threads * 32 : p.y.cols;
  for (int i = 0; i < m; ++i) {
    const int row = p.routing.rows[i];
    x[i] = p.x.row(row), y[i] = p.y.row(row) + n0;
    factor[i] = p.routing.weights ? p.slot_scaling[slot] * p.routing.weights[i] : p.slot_scaling[slot];
  }
  const bf16 *a = p.a.row(int64_t(slot) * p.max_rank), *b = p.b.row(int64_t(slot) * p.max_rank);
  const TileConfig config;
  _tile_loadconfig(&config);
  const int r0 = ldh / 16 * thread / threads * 16, r1 = ldh / 16 * (thread + 1) / threads * 16;
  if (r0 < r1) amx_shrink(x, m, p.x.cols, a + r0 * p.a.stride, p.a.stride, (r1 < rank ? r1 : rank) - r0, h + r0, ldh);
  team_barrier();
  if (n0 < n1) {
    split_h(h, ldh, mp, ldh / 16, factor, split);
    amx_expand(split, m, mp, rank, b + n0, p.b.stride, y, n1 - n0);
  }
  _tile_release();
}
