// Selection by magnitude on runs of contiguous entries; what each kernel does stands in topk.h.

typedef int32_t vi_mem __attribute__((vector_size(4 * LF_WIDTH), aligned(2), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LF_WIDTH)));
typedef uint16_t vh_mem __attribute__((vector_size(2 * LF_WIDTH), aligned(2), may_alias));
typedef int16_t vs __attribute__((vector_size(4 * LF_WIDTH)));
typedef int16_t vs_mem __attribute__((vector_size(4 * LF_WIDTH), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(LF_WIDTH)));

// W elements in order (Elem's halves need not be); pack() rounds to the type's own bits.
template <class T>
struct Flat;

template <>
struct Flat<float> {
  static vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
  static vi pack(vf v) { return reinterpret_cast<vi>(v); }
};

template <>
struct Flat<bf16> {
  static vf load(const bf16* p) {
#if LF_WIDTH == 16  // the compiler makes two halves of it
    return reinterpret_cast<vf>(reinterpret_cast<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))) << 16);
#else
    return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu) << 16);
#endif
  }
  static vh pack(vf v) { return __builtin_convertvector(Elem<bf16>::rounded(v) >> 16, vh); }
};

template <>
struct Flat<fp16> {
  static vf load(const fp16* p) { return Elem<fp16>::load<0>(p); }
  static vh pack(vf v) {
#if LF_WIDTH == 16
    return reinterpret_cast<vh>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif LF_WIDTH == 8
    return reinterpret_cast<vh>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
    vh h;
    for (int i = 0; i < W; ++i) h[i] = float_to_half(v[i]);
    return h;
#endif
  }
};

template <class V>
void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Past the caches where the instruction set can; p aligned to the vector.
template <class V>
void store_past(void* p, V v) {
#ifdef LF_X86
#if LF_WIDTH == 16
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#endif
#if LF_WIDTH >= 8
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#endif
  if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#endif
  store(p, v);
}

// x - minus, W at a time. at() takes a whole vector, tail() the last few entries and zeros after them.
template <class T, bool MINUS>
struct Source {
  const T *x, *minus;
  Source(const void* x, const void* minus) : x(static_cast<const T*>(x)), minus(static_cast<const T*>(minus)) {}
  vf at(int64_t i) const {
    vf v = Flat<T>::load(x + i);
    if (MINUS) v -= Flat<T>::load(minus + i);
    return v;
  }
  // Asks for what comes half a page later: the hardware's own prefetcher stops at the page's end. Measured: the count
  // of 32 MB of bf16 falls from 5.3 to 2.6 ms, of 64 MB of fp32 from 8.2 to 6.3.
  void ahead(int64_t i) const {
    constexpr int kBytes = 2048;
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kBytes);
    if (MINUS) __builtin_prefetch(reinterpret_cast<const char*>(minus + i) + kBytes);
  }
  vf tail(int64_t i, int count) const {
    T a[W] = {}, b[W] = {};
    __builtin_memcpy(a, x + i, count * sizeof(T));
    if (MINUS) __builtin_memcpy(b, minus + i, count * sizeof(T));
    return Source(a, b).at(0);
  }
};

inline vi key_of(vf v) { return reinterpret_cast<vi>(v) & 0x7fffffff; }

inline uint32_t bits_above(vi key, vi above) {  // bit i: key[i] > above[i]
#if LF_WIDTH == 16
  return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(key), reinterpret_cast<__m512i>(above));
#elif LF_WIDTH == 8
  return uint32_t(_mm256_movemask_ps(reinterpret_cast<__m256>(key > above)));
#elif defined(LF_X86)
  return uint32_t(_mm_movemask_ps(reinterpret_cast<__m128>(key > above)));
#else
  const vi m = key > above;
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(m[i] & 1) << i;
  return bits;
#endif
}

// Appends key's lanes in `in`.
inline int32_t* append(int32_t* found, vi key, uint32_t in) {
#if LF_WIDTH == 16
  _mm512_storeu_si512(found, _mm512_maskz_compress_epi32(__mmask16(in), reinterpret_cast<__m512i>(key)));
  return found + __builtin_popcount(in);
#else
  for (; in; in &= in - 1) *found++ = key[__builtin_ctz(in)];
  return found;
#endif
}

template <class T, bool MINUS>
Tally count_run(const void* x, const void* minus, int n, int32_t low, int32_t high, int32_t* found) {
  const Source<T, MINUS> source(x, minus);
  const vi vlow = low - vi{}, vhigh = high - vi{};
  vi most{};
  const int32_t* const begin = found;
  int64_t above = 0;
  const auto one = [&](vi key, uint32_t valid) {
    const uint32_t over = bits_above(key, vhigh) & valid;
    above += __builtin_popcount(over);
    found = append(found, key, bits_above(key, vlow) & ~over & valid);
    most = key > most ? key : most;
  };
  int i = 0;
  for (; i + W <= n; i += W) {
    source.ahead(i);
    one(key_of(source.at(i)), ~0u);
  }
  if (i < n) one(key_of(source.tail(i, n - i)), (1u << (n - i)) - 1);
  Tally t{int32_t(above), 0, int32_t(found - begin), 0, 0};
  for (int j = 0; j < W; ++j) t.max_key = most[j] > t.max_key ? most[j] : t.max_key;
  return t;
}

template <class T, bool MINUS>
Tally count_ties_run(const void* x, const void* minus, int n, int32_t low, int32_t high, int32_t* found) {
  const Tally inside = count_run<T, MINUS>(x, minus, n, low, high - 1, found);
  const Source<T, MINUS> source(x, minus);
  const vi vlow = low - vi{}, vhigh = high - vi{};
  vi at_low{}, at_high{};
  int i = 0;
  for (; i + W <= n; i += W) {
    const vi key = key_of(source.at(i));
    at_low -= key == vlow;
    at_high -= key == vhigh;
  }
  Tally t{inside.above, 0, inside.between, 0, inside.max_key};
  for (int j = 0; j < W; ++j) t.at_low += at_low[j], t.at_high += at_high[j];
  if (i < n) {
    const vi key = key_of(source.tail(i, n - i));
    for (int j = 0; j < n - i; ++j) t.at_low += key[j] == low, t.at_high += key[j] == high;
  }
  t.above -= t.at_high;
  if (low == high) t.at_low = 0;
  return t;
}

template <class T, bool MINUS>
void keys_run(const void* x, const void* minus, int n, int32_t* keys) {
  const Source<T, MINUS> source(x, minus);
  int i = 0;
  for (; i + W <= n; i += W) *reinterpret_cast<vi_mem*>(keys + i) = key_of(source.at(i));
  if (i < n) {
    const vi key = key_of(source.tail(i, n - i));
    for (int j = 0; j < n - i; ++j) keys[i + j] = key[j];
  }
}

template <class T, bool MINUS>
void gather_run(const void* x, const void* minus, const int64_t* at, int n, int32_t* keys) {
  const Source<T, MINUS> source(x, minus);
  for (int i = 0; i < n; i += W) {
    const int count = n - i < W ? n - i : W;
    T a[W] = {}, b[W] = {};
    for (int j = 0; j < count; ++j) {
      a[j] = source.x[at[i + j]];
      if (MINUS) b[j] = source.minus[at[i + j]];
    }
    const vi key = key_of(Source<T, MINUS>(a, b).at(0));
    for (int j = 0; j < count; ++j) keys[i + j] = key[j];
  }
}

template <class T, bool MINUS>
void histogram_run(const void* x, const void* minus, int n, int32_t high, int shift, uint32_t num_bins, uint32_t* bins) {
  constexpr int BLOCK = 512;
  int32_t keys[BLOCK];
  for (int i = 0; i < n; i += BLOCK) {
    const int count = n - i < BLOCK ? n - i : BLOCK;
    keys_run<T, MINUS>(static_cast<const T*>(x) + i, MINUS ? static_cast<const T*>(minus) + i : nullptr, count, keys);
    for (int j = 0; j < count; ++j) {  // four tables: neighbours often share a bin, and would wait for each other
      const uint32_t bin = uint32_t(high - keys[j]) >> shift;
      ++bins[(j & 3) * (num_bins + 1) + (bin < num_bins ? bin : num_bins)];
    }
  }
}

template <class T, bool MINUS>
void mask_run(const void* x, const void* minus, int n, int32_t above, uint8_t* out) {
  const Source<T, MINUS> source(x, minus);
  const vi limit = above - vi{};
  int i = 0;
  for (; i + W <= n; i += W) {
    source.ahead(i);
    const vi key = key_of(source.at(i));
#if LF_WIDTH == 16
    store(out + i, __builtin_convertvector((key > limit) & 1, vb));
#else  // a multiplication spreads seven bits over as many bytes
    const uint64_t keep = bits_above(key, limit), bytes = (((keep & 0x7f) * 0x2040810204081) & 0x101010101010101) | (keep >> 7 << 56);
    __builtin_memcpy(out + i, &bytes, W);
#endif
  }
  if (i < n) {
    const vi keep = key_of(source.tail(i, n - i)) > limit;
    for (int j = 0; j < n - i; ++j) out[i + j] = uint8_t(keep[j] & 1);
  }
}

template <class T, bool MINUS, bool PAST>
int prune_vectors(const Source<T, MINUS>& source, int n, int32_t above, T* y) {
  const auto put = [&](int i, auto v) {
    if (PAST) store_past(y + i, v);
    else store(y + i, v);
  };
  int i = 0;
  if constexpr (!MINUS && std::is_same_v<T, bf16>) {  // the bits themselves, 2 W at a time: keys without their low halves
    for (; i + 2 * W <= n; i += 2 * W) {
      source.ahead(i);
      const vs bits = *reinterpret_cast<const vs_mem*>(source.x + i);
      put(i, bits & ((bits & 0x7fff) > int16_t(above >> 16) - vs{}));
    }
  } else {
    const vi limit = above - vi{};
    for (; i + W <= n; i += W) {
      source.ahead(i);
      const vf v = source.at(i);
      put(i, Flat<T>::pack(reinterpret_cast<vf>(reinterpret_cast<vi>(v) & (key_of(v) > limit))));
    }
  }
  return i;
}

template <class T, bool MINUS>
void prune_run(const void* x, const void* minus, int n, int32_t above, bool past, void* out) {
  const Source<T, MINUS> source(x, minus);
  T* const y = static_cast<T*>(out);
  const bool aligned = reinterpret_cast<uintptr_t>(y) % sizeof(vi) == 0;
  int i = past && aligned ? prune_vectors<T, MINUS, true>(source, n, above, y) : prune_vectors<T, MINUS, false>(source, n, above, y);
  for (; i < n; i += W) {
    const int count = n - i < W ? n - i : W;
    const vf v = source.tail(i, count);
    const auto last = Flat<T>::pack(reinterpret_cast<vf>(reinterpret_cast<vi>(v) & (key_of(v) > above - vi{})));
    __builtin_memcpy(y + i, &last, count * sizeof(T));
  }
#ifdef LF_X86
  if (past) _mm_sfence();
#endif
}

template <class T, bool MINUS>
void bits_run(const void* x, const void* minus, int n, int32_t above, int split, uint64_t* words) {
  const Source<T, MINUS> source(x, minus);
  const vi limit = above - vi{}, or_equal = limit - 1;
  for (int i = 0; i < n; i += 64) {
    uint64_t more = 0, ties = 0;
    for (int j = 0; j < 64 && i + j < n; j += W) {
      source.ahead(i + j);
      const vi key = key_of(i + j + W <= n ? source.at(i + j) : source.tail(i + j, n - i - j));
      more |= uint64_t(bits_above(key, limit)) << j;
      ties |= uint64_t(bits_above(key, or_equal)) << j;
    }
    const auto first = [](int count) { return count <= 0 ? 0 : count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1; };
    words[i / 64] = (more | (ties & first(split - i))) & first(n - i);  // beyond n lie zeros of the tail
  }
}

template <class T, bool MINUS>
int take_run(const void* x, const void* minus, int n, const uint64_t* words, bool own, void* out) {
  T* y = static_cast<T*>(out);
  const auto take = [&](const auto& source) {
    for (int i = 0; i < n; i += 64) {
      int at = i;
      for (uint64_t word = words[i / 64]; word; at += W, word >>= W) {
        auto in = uint32_t(word & ((uint64_t(1) << W) - 1));
        if (!in) continue;
        const vf v = at + W <= n ? source.at(at) : source.tail(at, n - at);
#if LF_WIDTH == 16
        store(y, Flat<T>::pack(reinterpret_cast<vf>(_mm512_maskz_compress_ps(__mmask16(in), reinterpret_cast<__m512>(v)))));
        y += __builtin_popcount(in);
#else
        T lanes[W];
        store(lanes, Flat<T>::pack(v));
        for (; in; in &= in - 1) *y++ = lanes[__builtin_ctz(in)];
#endif
      }
    }
  };
  if (own) take(Source<T, false>(x, nullptr));
  else take(Source<T, MINUS>(x, minus));
  return int(y - static_cast<T*>(out));
}

template <class C>
int columns_run(const uint64_t* words, int n, int32_t first, C* out) {
  C* y = out;
  for (int i = 0; i < n; i += 64) {
    uint64_t word = words[i / 64];
#if LF_WIDTH == 16
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int j = first + i; word; j += W, word >>= W) {
      const auto in = __mmask16(word);
      const __m512i at = _mm512_maskz_compress_epi32(in, _mm512_add_epi32(lanes, _mm512_set1_epi32(j)));
      if (sizeof(C) == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtepi32_epi16(at));
      else _mm512_storeu_si512(y, at);
      y += __builtin_popcount(in);
    }
#else
    for (; word; word &= word - 1) *y++ = C(first + i + __builtin_ctzll(word));
#endif
  }
  return int(y - out);
}

template <class T, bool MINUS>
constexpr TopkRun topk_run() {
  return {count_run<T, MINUS>, count_ties_run<T, MINUS>, keys_run<T, MINUS>, gather_run<T, MINUS>, histogram_run<T, MINUS>,
          mask_run<T, MINUS>,  prune_run<T, MINUS>, bits_run<T, MINUS>,  take_run<T, MINUS>};
}

inline void fill_topk(TopkKernels& k) {
  k = {{{topk_run<float, false>(), topk_run<float, true>()},
        {topk_run<bf16, false>(), topk_run<bf16, true>()},
        {topk_run<fp16, false>(), topk_run<fp16, true>()}},
       columns_run<uint16_t>,
       columns_run<int32_t>};
}
