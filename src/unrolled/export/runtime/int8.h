/* Products in int8. A word holds four numbers of consecutive terms. Sums of whole numbers are exact, so they are the
 * same on all processors. */
#if LANES == 1 /* half as many sums at a time: there are fewer registers for whole numbers than for floats */
#define INT8_SUMS(products) (2 * (products))
#else
#define INT8_SUMS(products) (products)
#endif
#define TO_INTEGER 12582912.0f /* 1.5 * 2^23: y + TO_INTEGER has y, rounded to the nearest, in its last bits */

ALWAYS_INLINE VI v_load_words(const uint32_t *p) { VI v; COPY(&v, p, sizeof v); return v; }
#if LANES == 1
ALWAYS_INLINE VI v_words(int32_t word) { return word; }
ALWAYS_INLINE int32_t v_word(VI v, int lane) { (void)lane; return v; }
#else
ALWAYS_INLINE VI v_words(int32_t word) { return word - (VI){0}; }
ALWAYS_INLINE int32_t v_word(VI v, int lane) { return v[lane]; }
#endif

/* Factor: a word of a row. v_add_products adds its four products with the words of some columns. */
#if LANES == 16 && defined(__AVX512VNNI__)
#define UNSIGNED_WEIGHTS 1 /* one factor must be unsigned: 128 is added to the weights */
typedef VI Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) { return v_words(word); }
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)(w ^ v_words((int32_t)0x80808080u)), (__m512i)f);
}
#elif LANES == 8 && defined(__AVXVNNI__)
#define UNSIGNED_WEIGHTS 1
typedef VI Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) { return v_words(word); }
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  return (VI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)(w ^ v_words((int32_t)0x80808080u)), (__m256i)f);
}
#elif LANES == 16 && defined(__AVX512BW__)
/* The absolute values of the row, and the weights with its signs. No sum of two saturates: weights are at least -127. */
typedef struct { __m512i magnitude; __mmask64 negative; } Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) {
  const __m512i x = (__m512i)v_words(word);
  return (Factor){_mm512_abs_epi8(x), _mm512_movepi8_mask(x)};
}
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  const __m512i with_sign = _mm512_mask_sub_epi8((__m512i)w, f.negative, _mm512_setzero_si512(), (__m512i)w);
  return sum + (VI)_mm512_madd_epi16(_mm512_maddubs_epi16(f.magnitude, with_sign), _mm512_set1_epi16(1));
}
#elif LANES == 8 && defined(__AVX2__)
typedef struct { __m256i x, magnitude; } Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) {
  const __m256i x = (__m256i)v_words(word);
  return (Factor){x, _mm256_abs_epi8(x)};
}
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  const __m256i pairs = _mm256_maddubs_epi16(f.magnitude, _mm256_sign_epi8((__m256i)w, f.x));
  return sum + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif LANES == 4 && defined(__SSE2__)
typedef __m128i Factor;
ALWAYS_INLINE __m128i v_low_half(__m128i v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); }
ALWAYS_INLINE __m128i v_high_half(__m128i v) { return _mm_srai_epi16(_mm_unpackhi_epi8(v, v), 8); }
ALWAYS_INLINE Factor v_factor(int32_t word) { return v_low_half((__m128i)v_words(word)); }
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  const __m128 a = (__m128)_mm_madd_epi16(v_low_half((__m128i)w), f);
  const __m128 b = (__m128)_mm_madd_epi16(v_high_half((__m128i)w), f);
  return sum + (VI)_mm_shuffle_ps(a, b, 0x88) + (VI)_mm_shuffle_ps(a, b, 0xdd);
}
#elif LANES == 4 && defined(__aarch64__)
typedef int8x16_t Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) { return (int8x16_t)v_words(word); }
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
#if defined(__ARM_FEATURE_DOTPROD)
  return (VI)vdotq_s32((int32x4_t)sum, (int8x16_t)w, f);
#else
  const int16x8_t a = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8(f)), b = vmull_high_s8((int8x16_t)w, f);
  return sum + (VI)vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b));
#endif
}
#elif LANES == 4 && defined(__wasm_simd128__)
#include <wasm_simd128.h>
typedef v128_t Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) { return wasm_i16x8_extend_low_i8x16((v128_t)v_words(word)); }
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  const v128_t a = wasm_i32x4_dot_i16x8(wasm_i16x8_extend_low_i8x16((v128_t)w), f);
  const v128_t b = wasm_i32x4_dot_i16x8(wasm_i16x8_extend_high_i8x16((v128_t)w), f);
  return sum + (VI)wasm_i32x4_shuffle(a, b, 0, 2, 4, 6) + (VI)wasm_i32x4_shuffle(a, b, 1, 3, 5, 7);
}
#elif LANES == 1 && defined(__ARM_FEATURE_SIMD32) /* as on a Cortex-M4: two products of 16 bits at a time */
#include <arm_acle.h>
typedef struct { int32_t even, odd; } Factor;
ALWAYS_INLINE Factor v_factor(int32_t word) {
  return (Factor){(int32_t)__sxtb16((int8x4_t)word), (int32_t)__sxtb16((int8x4_t)__ror((uint32_t)word, 8))};
}
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  const int32_t even = (int32_t)__sxtb16((int8x4_t)w), odd = (int32_t)__sxtb16((int8x4_t)__ror((uint32_t)w, 8));
  return __smlad(odd, f.odd, __smlad(even, f.even, sum));
}
#else
typedef struct { int32_t x[4]; } Factor;
ALWAYS_INLINE VI v_signed_byte(VI w, int k) { return (VI)((VU)w << (24 - 8 * k)) >> 24; }
ALWAYS_INLINE Factor v_factor(int32_t word) {
  Factor f;
  for (int k = 0; k < 4; k++) f.x[k] = (int8_t)((uint32_t)word >> 8 * k & 255);
  return f;
}
ALWAYS_INLINE VI v_add_products(VI sum, Factor f, VI w) {
  for (int k = 0; k < 4; k++) sum = sum + v_signed_byte(w, k) * f.x[k];
  return sum;
}
#endif

/* Numbers of a row from k on; zeros after its end. */
ALWAYS_INLINE V v_load_row(const float *x, const int terms, const int k) {
  if (k + LANES <= terms) return v_load(x + k);
#if LANES == 16
  return (V)_mm512_maskz_loadu_ps(k < terms ? (__mmask16)((1u << (terms - k)) - 1) : 0, x + k);
#else
  V v = splat(0);
  for (int j = 0; j < LANES; j++)
    if (k + j < terms) v = v_with_lane(v, j, x[k + j]);
  return v;
#endif
}

/* Rounds a row to whole numbers from -127 to 127 times a scale: that of its largest value, unless `scale` is given. Of a
 * row with infinity or NaN, the scale is NaN. Writes the scale, what sums begin with, and words for blocks of 16 terms. */
static inline void v_quantize_row(const float *x, const int terms, float scale, float *to) {
  VI most = v_words(0);
  for (int k = 0; k < terms; k += LANES) { /* as whole numbers, the bits are in the order of the values; NaN is last */
    const VI bits = v_bits(v_absolute(v_load_row(x, terms, k)));
    most = v_bits(v_choose((VI)(bits > most), v_float(bits), v_float(most)));
  }
  int32_t largest_bits = 0;
#if LANES == 16
  largest_bits = _mm512_reduce_max_epi32((__m512i)most);
#else
  for (int j = 0; j < LANES; j++)
    if (v_word(most, j) > largest_bits) largest_bits = v_word(most, j);
#endif
  float largest;
  COPY(&largest, &largest_bits, 4);
  float inverse = scale > 0 ? 1 / scale : 0;
  if (!(largest < INFINITY)) {
    scale = NAN, inverse = 0;
  } else if (!(scale > 0) && largest >= 7.888609052210118e-31f) { /* 2^-100; below, the inverse could be infinite */
    scale = largest / 127, inverse = 127 / largest;
  }
  VI sum = v_words(0);
  for (int k = 0; k < terms; k += 16) {
    int8_t bytes[16];
    for (int u = 0; u < 16; u += LANES) {
      V y = v_load_row(x, terms, k + u) * splat(inverse);
      y = v_choose(v_below(y, splat(127)), y, splat(127));
      y = v_choose(v_below(splat(-127), y), y, splat(-127));
      const VI q = v_bits(y + splat(TO_INTEGER)) - v_bits(splat(TO_INTEGER));
      sum = sum + q;
#if LANES == 16
      _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)q));
#else
      for (int j = 0; j < LANES; j++) bytes[u + j] = (int8_t)v_word(q, j);
#endif
    }
#if LANES > 1 && !defined(__BIG_ENDIAN__)
    COPY(to + 2 + k / 4, bytes, 16);
#else
    for (int j = 0; j < 16; j += 4) {
      uint32_t word = 0;
      for (int b = 0; b < 4; b++) word |= (uint32_t)(uint8_t)bytes[j + b] << 8 * b;
      COPY(to + 2 + (k + j) / 4, &word, 4);
    }
#endif
  }
  int32_t start = 0;
#if defined(UNSIGNED_WEIGHTS) && LANES == 16
  start = -128 * _mm512_reduce_add_epi32((__m512i)sum);
#elif defined(UNSIGNED_WEIGHTS)
  for (int j = 0; j < LANES; j++) start -= 128 * v_word(sum, j);
#endif
  COPY(to + 1, &start, 4);
  to[0] = scale;
}

/* s[j] = the products of a quantized row with columns of w from `column` on, for j = panel * products + product. The
 * layout of w is (term / 4, product, column), and that of the scales (product, column). */
ALWAYS_INLINE void v_multiply_int8(V *s, const float *row, const uint32_t *w, const float *scales, const int terms,
                                   const int products, const int width, const int column, const int panels) {
  VI sum[16];
  int32_t word;
  COPY(&word, row + 1, 4);
  UNROLL for (int j = 0; j < panels * products; j++) sum[j] = v_words(word);
  for (int k = 0; k < (terms + 3) / 4; k++) {
    COPY(&word, row + 2 + k, 4);
    const Factor f = v_factor(word);
    const uint32_t *const line = w + (k * products * width + column);
    UNROLL for (int j = 0; j < panels * products; j++)
      sum[j] = v_add_products(sum[j], f, v_load_words(line + j % products * width + j / products * LANES));
  }
  UNROLL for (int j = 0; j < panels * products; j++)
    s[j] = v_number(sum[j]) * v_load(scales + j % products * width + column + j / products * LANES) * splat(row[0]);
}
