// Selection by magnitude on runs of contiguous entries; what each kernel does stands in topk.h.

typedef int32_t vi_mem __attribute__((vector_size(4 * LF_WIDTH), aligned(2), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LF_WIDTH)));
typedef uint16_t vh_mem __attribute__((vector_size(2 * LF_WIDTH), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(LF_WIDTH)));
typedef int8_t vb_mem __attribute__((vector_size(LF_WIDTH), aligned(1), may_alias));

// W elements in order (Elem's halves need not be).
template <class T>
struct Flat;

template <>
struct Flat<float> {
  static vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
  static void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
};

template <>
struct Flat<bf16> {
  static vf load(const bf16* p) {
    return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu) << 16);
  }
  static void store(bf16* p, vf v) { *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(Elem<bf16>::rounded(v) >> 16, vh); }
};

template <>
struct Flat<fp16> {
  static vf load(const fp16* p) { return Elem<fp16>::load<0>(p); }
  static void store(fp16* p, vf v) { Elem<fp16>::store_half(p, v); }
};

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

template <class T, bool MINUS>
Tally count_run(const void* x, const void* minus, int n, int32_t low, int32_t high, int32_t* found) {
  const Source<T, MINUS> source(x, minus);
  const vi vlow = low - vi{}, vhigh = high - vi{};
  vi above{}, from_high{}, from_low{}, most{};
  const int32_t* const first = found;
  int i = 0;
  for (; i + W <= n; i += W) {
    const vi key = key_of(source.at(i));
    most = key > most ? key : most;
    above -= key > vhigh;
    from_high -= key >= vhigh;
    from_low -= key >= vlow;
#if LF_WIDTH == 16
    const __m512i k = reinterpret_cast<__m512i>(key);
    const __mmask16 in = _mm512_cmpgt_epi32_mask(k, reinterpret_cast<__m512i>(vlow)) & _mm512_cmplt_epi32_mask(k, reinterpret_cast<__m512i>(vhigh));
    _mm512_storeu_si512(found, _mm512_maskz_compress_epi32(in, k));
    found += __builtin_popcount(in);
#else
    for (uint32_t in = bits_above(key, vlow) & bits_above(vhigh, key); in; in &= in - 1) *found++ = key[__builtin_ctz(in)];
#endif
  }
  Tally t{0, 0, 0, 0, 0};
  int64_t ge_high = 0, ge_low = 0;
  for (int j = 0; j < W; ++j) {
    t.above += above[j], ge_high += from_high[j], ge_low += from_low[j];
    t.max_key = most[j] > t.max_key ? most[j] : t.max_key;
  }
  if (i < n) {
    const vi key = key_of(source.tail(i, n - i));
    for (int j = 0; j < n - i; ++j) {
      const int32_t k = key[j];
      t.above += k > high, ge_high += k >= high, ge_low += k >= low;
      t.max_key = k > t.max_key ? k : t.max_key;
      if (k > low && k < high) *found++ = k;
    }
  }
  t.at_high = int32_t(ge_high) - t.above;
  t.between = int32_t(found - first);
  t.at_low = int32_t(ge_low - ge_high) - t.between;  // 0 where low == high
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
    for (int j = 0; j < count; ++j) {
      const uint32_t bin = uint32_t(high - keys[j]) >> shift;
      if (keys[j] <= high && bin < num_bins) ++bins[bin];
    }
  }
}

template <class T, bool MINUS>
void mask_run(const void* x, const void* minus, int n, int32_t above, uint8_t* out) {
  const Source<T, MINUS> source(x, minus);
  const vi limit = above - vi{};
  int i = 0;
  for (; i + W <= n; i += W) {
    const vi keep = key_of(source.at(i)) > limit;
    *reinterpret_cast<vb_mem*>(out + i) = __builtin_convertvector(keep & 1, vb);
  }
  if (i < n) {
    const vi keep = key_of(source.tail(i, n - i)) > limit;
    for (int j = 0; j < n - i; ++j) out[i + j] = uint8_t(keep[j] & 1);
  }
}

template <class T, bool MINUS>
void prune_run(const void* x, const void* minus, int n, int32_t above, bool stream, void* out) {
  const Source<T, MINUS> source(x, minus);
  T* const y = static_cast<T*>(out);
  const vi limit = above - vi{};
  (void)stream;
  const auto kept = [&](vf v) { return reinterpret_cast<vf>(reinterpret_cast<vi>(v) & (key_of(v) > limit)); };
  int i = 0;
  for (; i + W <= n; i += W) Flat<T>::store(y + i, kept(source.at(i)));
  if (i < n) {
    T last[W];
    Flat<T>::store(last, kept(source.tail(i, n - i)));
    __builtin_memcpy(y + i, last, (n - i) * sizeof(T));
  }
}

template <class T, bool MINUS>
void bits_run(const void* x, const void* minus, int n, int32_t above, int split, uint64_t* words) {
  const Source<T, MINUS> source(x, minus);
  const vi limit = above - vi{}, or_equal = limit - 1;
  for (int i = 0; i < n; i += 64) {
    uint64_t more = 0, ties = 0;
    for (int j = 0; j < 64 && i + j < n; j += W) {
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
        Flat<T>::store(y, reinterpret_cast<vf>(_mm512_maskz_compress_ps(__mmask16(in), reinterpret_cast<__m512>(v))));
        y += __builtin_popcount(in);
#else
        T lanes[W];
        Flat<T>::store(lanes, v);
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
  return {count_run<T, MINUS>, keys_run<T, MINUS>, gather_run<T, MINUS>, histogram_run<T, MINUS>,
          mask_run<T, MINUS>,  prune_run<T, MINUS>, bits_run<T, MINUS>,  take_run<T, MINUS>};
}

inline void fill_topk(TopkKernels& k) {
  k = {{{topk_run<float, false>(), topk_run<float, true>()},
        {topk_run<bf16, false>(), topk_run<bf16, true>()},
        {topk_run<fp16, false>(), topk_run<fp16, true>()}},
       columns_run<uint16_t>,
       columns_run<int32_t>};
}
