/* Vectors of the machine's width with the vector types of gcc and clang, or single floats where there are none. Sums
 * and functions run in the order of the library unrolled, so they give its bits: don't compile with -ffast-math, and
 * give -ffp-contract=off, because only v_fma() may fuse a multiplication and an addition. */
#if defined(__FAST_MATH__)
#error "this code needs exact arithmetic: compile it without -ffast-math"
#endif

#if defined(LANES)
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#elif defined(__SSE2__) || defined(__aarch64__) || defined(__wasm_simd128__)
#define LANES 4
#else
#define LANES 1
#endif
#if LANES > 1 && (defined(__x86_64__) || defined(__i386__))
#include <immintrin.h>
#elif LANES > 1 && defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#include <math.h>
#include <string.h>
#pragma fp_contract(off)
#define ALWAYS_INLINE static __forceinline
#define ALIGNED
#define UNROLL
#define COPY memcpy
#define CLEAR memset
#else
#define ALWAYS_INLINE static inline __attribute__((always_inline, unused))
#define ALIGNED __attribute__((aligned(64))) /* to a cache line */
#if defined(__clang__)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define COPY __builtin_memcpy
#define CLEAR __builtin_memset
#undef INFINITY
#undef NAN
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif

#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA)
#define FUSED 1
#else
#define FUSED 0
#endif

/* V: floats. VI: their bits; in a mask, all bits of a lane are equal. */
#if LANES == 1
typedef float V;
typedef int32_t VI;
typedef uint32_t VU;
ALWAYS_INLINE VI v_bits(V x) { VI i; COPY(&i, &x, 4); return i; }
ALWAYS_INLINE V v_float(VI i) { V x; COPY(&x, &i, 4); return x; }
ALWAYS_INLINE V splat(float x) { return x; }
ALWAYS_INLINE float v_lane(V x, int lane) { (void)lane; return x; }
ALWAYS_INLINE V v_with_lane(V x, int lane, float value) { (void)x, (void)lane; return value; }
ALWAYS_INLINE V v_number(VI i) { return (V)i; }
ALWAYS_INLINE VI v_below(V a, V b) { return -(a < b); }
ALWAYS_INLINE VI v_equal(V a, V b) { return -(a == b); }
ALWAYS_INLINE V v_choose(VI mask, V a, V b) { return mask ? a : b; }
ALWAYS_INLINE V v_truth(VI mask) { return mask ? 1.0f : 0.0f; }
#else
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
ALWAYS_INLINE VI v_bits(V x) { return (VI)x; }
ALWAYS_INLINE V v_float(VI i) { return (V)i; }
ALWAYS_INLINE V splat(float x) { return x - (V){0}; }
ALWAYS_INLINE float v_lane(V x, int lane) { return x[lane]; }
ALWAYS_INLINE V v_with_lane(V x, int lane, float value) { x[lane] = value; return x; }
ALWAYS_INLINE V v_number(VI i) { return __builtin_convertvector(i, V); }
ALWAYS_INLINE VI v_below(V a, V b) { return (VI)(a < b); }
ALWAYS_INLINE VI v_equal(V a, V b) { return (VI)(a == b); }
ALWAYS_INLINE V v_choose(VI mask, V a, V b) { return (V)((mask & (VI)a) | (~mask & (VI)b)); }
ALWAYS_INLINE V v_truth(VI mask) { return (V)(mask & (VI)splat(1)); }
#endif

ALWAYS_INLINE V v_load(const float *p) { V v; COPY(&v, p, sizeof v); return v; }
/* Loads or stores the first n lanes; the other lanes are 0. */
ALWAYS_INLINE V v_load_first(const float *p, int n) {
  if (n >= LANES) return v_load(p);
  V v = splat(0);
  for (int k = 0; k < n; k++) v = v_with_lane(v, k, p[k]);
  return v;
}
ALWAYS_INLINE void v_store(float *p, V v, int n) {
  if (n >= LANES) COPY(p, &v, sizeof v);
  else
    for (int k = 0; k < n; k++) p[k] = v_lane(v, k);
}
/* The first n lanes of v, and the other lanes of rest. */
ALWAYS_INLINE V v_first(int n, V v, V rest) {
  for (int k = n; k < LANES; k++) v = v_with_lane(v, k, v_lane(rest, k));
  return v;
}

/* a b + c, rounded once if the machine can. */
ALWAYS_INLINE V v_fma(V a, V b, V c) {
#if LANES == 16
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && FUSED
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif LANES == 4 && defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif LANES == 4 && defined(__FMA__)
  return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif LANES == 1 && FUSED && defined(__arm__) /* clang would call fmaf */
  __asm__("vfma.f32 %0, %1, %2" : "+t"(c) : "t"(a), "t"(b));
  return c;
#elif LANES == 1 && FUSED
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

/* x, but at most top or at least bottom. NaN stays NaN. */
ALWAYS_INLINE V v_at_most(V x, float top) {
#if LANES == 16
  return (V)_mm512_min_ps((__m512)splat(top), (__m512)x);
#elif LANES == 8
  return (V)_mm256_min_ps((__m256)splat(top), (__m256)x);
#elif LANES == 4 && defined(__SSE2__)
  return (V)_mm_min_ps((__m128)splat(top), (__m128)x);
#else
  return v_choose(v_below(splat(top), x), splat(top), x);
#endif
}
ALWAYS_INLINE V v_at_least(V x, float bottom) {
#if LANES == 16
  return (V)_mm512_max_ps((__m512)splat(bottom), (__m512)x);
#elif LANES == 8
  return (V)_mm256_max_ps((__m256)splat(bottom), (__m256)x);
#elif LANES == 4 && defined(__SSE2__)
  return (V)_mm_max_ps((__m128)splat(bottom), (__m128)x);
#else
  return v_choose(v_below(x, splat(bottom)), splat(bottom), x);
#endif
}
ALWAYS_INLINE V v_absolute(V x) { return v_float(v_bits(x) & INT32_MAX); }
ALWAYS_INLINE VI v_sign_bit(V x) { return v_bits(x) & INT32_MIN; }
ALWAYS_INLINE V v_sign_of(V magnitude, V sign) { return v_float(v_bits(v_absolute(magnitude)) | v_sign_bit(sign)); }
ALWAYS_INLINE V v_maximum(V a, V b) { return v_choose(v_equal(b, b), v_choose(v_below(a, b), b, a), b); }
ALWAYS_INLINE V v_minimum(V a, V b) { return v_choose(v_equal(b, b), v_choose(v_below(b, a), b, a), b); }
ALWAYS_INLINE V v_relu(V x) { return v_at_least(x, 0); }
ALWAYS_INLINE V v_sign(V x) { return v_truth(v_below(splat(0), x)) - v_truth(v_below(x, splat(0))); }
ALWAYS_INLINE V v_where(V c, V a, V b) { return v_choose(v_equal(c, splat(0)), b, a); }
ALWAYS_INLINE V v_round_to_float(V x) { return x; }

/* s[j] = the products of x with columns of w from `column` on, for j = panel * products + product. The layout of w is
 * (term, product, column). Sums run over the terms in order, in blocks of 32, like those of the library. */
ALWAYS_INLINE void multiply(V *s, const float *x, const float *w, const int terms, const int products, const int width,
                            const int column, const int panels) {
  UNROLL for (int j = 0; j < panels * products; j++) s[j] = splat(0); /* compilers don't see that it isn't read */
  for (int from = 0; from < terms; from += 32) {
    V sum[16];
    UNROLL for (int j = 0; j < panels * products; j++) sum[j] = splat(0);
    const int end = terms - from < 32 ? terms : from + 32;
    for (int k = from; k < end; k++) {
      const V factor = splat(x[k]);
      const float *const row = w + (k * products * width + column);
      UNROLL for (int j = 0; j < panels * products; j++)
        sum[j] = v_fma(v_load(row + j % products * width + j / products * LANES), factor, sum[j]);
    }
    UNROLL for (int j = 0; j < panels * products; j++) s[j] = from ? s[j] + sum[j] : sum[j];
  }
}

/* How many panels of columns to compute at a time, so that their sums fit into the registers. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define MAX_SUMS 16
#else
#define MAX_SUMS 8
#endif
#define FITS(panels, products, width) ((panels) * (products) <= MAX_SUMS && (panels) * LANES <= (width))
#define PANELS(products, width) (FITS(4, products, width) ? 4 : FITS(2, products, width) ? 2 : 1)

/* Runs a pass over `width` columns whose largest group of products has `products`. Its arguments follow. */
#define RUN(pass, products, width, ...)                                               \
  do {                                                                                \
    enum { TILE = PANELS(products, width) * LANES, WHOLE = (width) / TILE * TILE };   \
    for (int at = 0; at < WHOLE; at += TILE) pass(__VA_ARGS__, at, TILE / LANES);     \
    for (int at = WHOLE; at < (width); at += LANES) pass(__VA_ARGS__, at, 1);         \
  } while (0)
