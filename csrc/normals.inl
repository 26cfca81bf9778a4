// The four rows of a NormalsGroup, W columns at a time. Included once per instruction set.

// High and low half of a * b, lane by lane.
#ifdef LF_X86
inline vu even_products(vu a, vu b) {  // of lanes 0, 2, ..., 64 bits each
#if LF_WIDTH == 16
  return reinterpret_cast<vu>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif LF_WIDTH == 8
  return reinterpret_cast<vu>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return reinterpret_cast<vu>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}

inline void multiply(vu a, uint32_t b, vu* high, vu* low) {
#if LF_WIDTH == 16
  const vi odd = {1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15};
  const vi highs = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  const vi lows = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
#elif LF_WIDTH == 8
  const vi odd = {1, 1, 3, 3, 5, 5, 7, 7}, highs = {1, 9, 3, 11, 5, 13, 7, 15}, lows = {0, 8, 2, 10, 4, 12, 6, 14};
#else
  const vi odd = {1, 1, 3, 3}, highs = {1, 5, 3, 7}, lows = {0, 4, 2, 6};
#endif
  const vu factor = b - vu{};
  const vu p = even_products(a, factor), q = even_products(__builtin_shuffle(a, odd), factor);
  *high = __builtin_shuffle(p, q, highs);
  *low = __builtin_shuffle(p, q, lows);
}
#else
inline void multiply(vu a, uint32_t b, vu* high, vu* low) {
  for (int i = 0; i < W; ++i) {
    const uint64_t p = uint64_t(a[i]) * b;
    (*high)[i] = uint32_t(p >> 32), (*low)[i] = uint32_t(p);
  }
}
#endif

inline vf square_root(vf x) {
#if defined(LF_X86) && LF_WIDTH == 16
  return reinterpret_cast<vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(LF_X86) && LF_WIDTH == 8
  return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(LF_X86)
  return reinterpret_cast<vf>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  vf y;
  for (int i = 0; i < W; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
inline vi select(vi mask, vi a, vi b) { return (a & mask) | (b & ~mask); }

// sqrt(-2 ln u) for u = (bits + 1/2) 2^-23, bits < 2^23: u = 2^e m with m near 1, ln m = 2 artanh((m - 1) / (m + 1)).
inline vf radius(vu bits) {
  const vu u = reinterpret_cast<vu>((to_float(reinterpret_cast<vi>(bits)) + 0.5f) * 0x1p-23f);
  const vu shifted = u - 0x3f3504f3u;  // so that m lies between sqrt(1/2) and sqrt(2)
  const vi e = reinterpret_cast<vi>(shifted) >> 23;
  const vf m = reinterpret_cast<vf>((shifted & 0x7fffffu) + 0x3f3504f3u);
  const vf s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const vf series = 1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
  return square_root(-2.0f * (to_float(e) * 0.69314718f + 2.0f * s * series));
}

// Cosine and sine of int32(word) pi 2^-31: whole quarter turns apart, the rest by its series.
inline void cos_sin(vu word, vf* cosine, vf* sine) {
  const vi quarter = reinterpret_cast<vi>(word + 0x20000000u) >> 30;
  const vi rest = reinterpret_cast<vi>(word - (reinterpret_cast<vu>(quarter) << 30));
  const vf x = to_float(rest) * 1.46291807927e-9f, t = x * x;  // pi 2^-31
  const vf s = x * (1.0f - t * (1.0f / 6 - t * (1.0f / 120 - t * (1.0f / 5040 - t * (1.0f / 362880)))));
  const vf c = 1.0f - t * (1.0f / 2 - t * (1.0f / 24 - t * (1.0f / 720 - t * (1.0f / 40320 - t * (1.0f / 3628800)))));
  const vi swap = -(quarter & 1);
  const vi negative_cosine = ((quarter + 1) & 2) << 30, negative_sine = (quarter & 2) << 30;
  *cosine = reinterpret_cast<vf>(select(swap, reinterpret_cast<vi>(s), reinterpret_cast<vi>(c)) ^ negative_cosine);
  *sine = reinterpret_cast<vf>(select(swap, reinterpret_cast<vi>(c), reinterpret_cast<vi>(s)) ^ negative_sine);
}

void normals(const NormalsGroup& g) {
  const int64_t r = g.first_row;
  const uint32_t quad = uint32_t(kNormalsGroup * (r / kNormalsChunk) + r % kNormalsGroup);
  vu lanes;
  for (int i = 0; i < W; ++i) lanes[i] = uint32_t(i);
  for (int64_t at = 0; at < g.cols; at += W) {
    vu c0 = quad - vu{}, c1 = lanes + uint32_t(at), c2 = g.matrix - vu{}, c3 = g.draw - vu{};
    uint32_t k0 = uint32_t(g.seed), k1 = uint32_t(g.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      vu high0, low0, high2, low2;
      multiply(c0, 0xD2511F53u, &high0, &low0);
      multiply(c2, 0xCD9E8D57u, &high2, &low2);
      c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
    }
    vf out[4];
    const vf r0 = radius(c0 >> 9), r1 = radius(c2 >> 9);
    cos_sin(c1, &out[0], &out[1]);
    cos_sin(c3, &out[2], &out[3]);
    out[0] *= r0, out[1] *= r0, out[2] *= r1, out[3] *= r1;
    const int64_t left = g.cols - at;
    for (int t = 0; t < 4; ++t) {
      const int64_t row = r + t * kNormalsGroup;
      if (row >= g.rows) break;
      float* const to = g.data + row * g.cols + at;
      if (left >= W) *reinterpret_cast<vf_mem*>(to) = out[t];
      else std::memcpy(to, &out[t], size_t(left) * sizeof(float));
    }
  }
}
