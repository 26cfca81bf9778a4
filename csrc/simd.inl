// Vectors of LF_WIDTH floats and the element types that load into them. Included once per instruction set, inside that
// set's namespace and target pragma; plain GNU vector extensions, intrinsics only where they say what C++ cannot.

typedef float vf __attribute__((vector_size(4 * LF_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * LF_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * LF_WIDTH)));
typedef float vf_mem __attribute__((vector_size(4 * LF_WIDTH), aligned(2), may_alias));
typedef uint32_t vu_mem __attribute__((vector_size(4 * LF_WIDTH), aligned(2), may_alias));

constexpr int W = LF_WIDTH;
constexpr int STEP = 2 * W;  // elements per step: two vectors, so that 16-bit types fill whole registers

inline vf splat(float s) { return s - vf{}; }

// ---- fp16 <-> fp32 where the CPU has no instruction for it ----
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else {  // shift into place, then let one multiplication fix the exponent of normals and denormals alike
    bits = rest << 13;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    __builtin_memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and up
  if (bits < 0x38800000u) {                        // denormal half: adding 0.5 aligns and rounds the mantissa
    float g;
    __builtin_memcpy(&g, &bits, 4);
    g += 0.5f;
    __builtin_memcpy(&bits, &g, 4);
    return sign | uint16_t(bits - 0x3f000000u);
  }
  return sign | uint16_t((bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13);
}

// ---- element types: load<0> and load<1> give the two vectors of a step, store puts them back ----
// Which elements of the step land in which vector is the type's own affair; loads and stores agree.
template <class T>
struct Elem;

template <>
struct Elem<float> {
  template <int HALF>
  static vf load(const float* p) {
    return *reinterpret_cast<const vf_mem*>(p + HALF * W);
  }
  static void store(float* p, vf v0, vf v1) {
    *reinterpret_cast<vf_mem*>(p) = v0;
    *reinterpret_cast<vf_mem*>(p + W) = v1;
  }
};

template <>
struct Elem<bf16> {  // even elements, then odd ones: a shift and a mask, no shuffle
  template <int HALF>
  static vf load(const bf16* p) {
    const vu v = *reinterpret_cast<const vu_mem*>(p);
    return reinterpret_cast<vf>(HALF == 0 ? v << 16 : v & 0xffff0000u);
  }
  static vu rounded(vf v) {  // to nearest even, in the high half
    const vu u = reinterpret_cast<vu>(v);
    const vu r = u + 0x7fffu + ((u >> 16) & 1u);
    const vi is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    return (r & ~reinterpret_cast<vu>(is_nan)) | ((u | 0x400000u) & reinterpret_cast<vu>(is_nan));
  }
  static void store(bf16* p, vf v0, vf v1) {
    *reinterpret_cast<vu_mem*>(p) = (rounded(v0) >> 16) | (rounded(v1) & 0xffff0000u);
  }
};

template <>
struct Elem<fp16> {
#ifdef LF_F16C
  template <int HALF>
  static vf load(const fp16* p) {
#if LF_WIDTH == 16
    return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + HALF * W))));
#else
    return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + HALF * W))));
#endif
  }
  static void store_half(fp16* p, vf v) {
#if LF_WIDTH == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#endif
  }
#else
  template <int HALF>
  static vf load(const fp16* p) {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = half_to_float(p[HALF * W + i].bits);
    return v;
  }
  static void store_half(fp16* p, vf v) {
    for (int i = 0; i < W; ++i) p[i].bits = float_to_half(v[i]);
  }
#endif
  static void store(fp16* p, vf v0, vf v1) {
    store_half(p, v0);
    store_half(p + W, v1);
  }
};

// ---- sums of four vectors at once; the tree of each sum is fixed, whatever the other three hold ----
inline vf sum4(vf a, vf b, vf c, vf d) {  // the four sums lie in lanes 0, W/4, 2W/4, 3W/4
#if LF_WIDTH == 16
  const vi lo = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const vi hi = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
  const vi lo2 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const vi hi2 = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  const vi swap2 = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
  const vi swap1 = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  const vf p = __builtin_shuffle(a, b, lo) + __builtin_shuffle(a, b, hi);
  const vf q = __builtin_shuffle(c, d, lo) + __builtin_shuffle(c, d, hi);
  vf v = __builtin_shuffle(p, q, lo2) + __builtin_shuffle(p, q, hi2);
  v += __builtin_shuffle(v, swap2);
  return v + __builtin_shuffle(v, swap1);
#elif LF_WIDTH == 8
  const vi lo = {0, 1, 2, 3, 8, 9, 10, 11}, hi = {4, 5, 6, 7, 12, 13, 14, 15};
  const vi lo2 = {0, 1, 4, 5, 8, 9, 12, 13}, hi2 = {2, 3, 6, 7, 10, 11, 14, 15};
  const vi swap1 = {1, 0, 3, 2, 5, 4, 7, 6};
  const vf p = __builtin_shuffle(a, b, lo) + __builtin_shuffle(a, b, hi);
  const vf q = __builtin_shuffle(c, d, lo) + __builtin_shuffle(c, d, hi);
  const vf v = __builtin_shuffle(p, q, lo2) + __builtin_shuffle(p, q, hi2);
  return v + __builtin_shuffle(v, swap1);
#else
  const vi lo = {0, 1, 4, 5}, hi = {2, 3, 6, 7}, even = {0, 2, 4, 6}, odd = {1, 3, 5, 7};
  const vf p = __builtin_shuffle(a, b, lo) + __builtin_shuffle(a, b, hi);
  const vf q = __builtin_shuffle(c, d, lo) + __builtin_shuffle(c, d, hi);
  return __builtin_shuffle(p, q, even) + __builtin_shuffle(p, q, odd);
#endif
}
