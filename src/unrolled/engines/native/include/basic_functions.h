// Elementwise functions that are exact, or that call libm for each element.
#pragma once
#include "vectors.h"

constexpr bool SINGLE = sizeof(T) == 4;
constexpr int MANTISSA = SINGLE ? 23 : 52, BIAS = SINGLE ? 127 : 1023;
// Adding and subtracting it rounds a number to the nearest integer. The sum has the last bits of that integer.
constexpr T TO_INTEGER = SINGLE ? 12582912 : 6755399441055744;  // 1.5 * 2^23, 1.5 * 2^52

template <class F> static inline V each(V x, F f) {
  V y;
  for (int k = 0; k < L; k++) y[k] = f(x[k]);
  return y;
}

template <class F> static inline V each(V x, V z, F f) {
  V y;
  for (int k = 0; k < L; k++) y[k] = f(x[k], z[k]);
  return y;
}

static inline V absolute(V x) { return (V)((VI)x & std::numeric_limits<I>::max()); }

static inline VI sign_bit(V x) { return (VI)x & std::numeric_limits<I>::min(); }

static inline V sign_of(V magnitude, V sign) { return (V)((VI)absolute(magnitude) | sign_bit(sign)); }

// Clamp x from above (below). NaN stays NaN: if operands are unordered, the instruction returns the second one.
static inline V at_most(V x, T top) {
#if defined(__AVX512F__)
  if constexpr (SINGLE) return (V)_mm512_min_ps((__m512)splat(top), (__m512)x);
  else return (V)_mm512_min_pd((__m512d)splat(top), (__m512d)x);
#elif defined(__AVX__)
  if constexpr (SINGLE) return (V)_mm256_min_ps((__m256)splat(top), (__m256)x);
  else return (V)_mm256_min_pd((__m256d)splat(top), (__m256d)x);
#elif defined(__x86_64__)
  if constexpr (SINGLE) return (V)_mm_min_ps((__m128)splat(top), (__m128)x);
  else return (V)_mm_min_pd((__m128d)splat(top), (__m128d)x);
#else
  return splat(top) < x ? splat(top) : x;
#endif
}

static inline V at_least(V x, T bottom) {
#if defined(__AVX512F__)
  if constexpr (SINGLE) return (V)_mm512_max_ps((__m512)splat(bottom), (__m512)x);
  else return (V)_mm512_max_pd((__m512d)splat(bottom), (__m512d)x);
#elif defined(__AVX__)
  if constexpr (SINGLE) return (V)_mm256_max_ps((__m256)splat(bottom), (__m256)x);
  else return (V)_mm256_max_pd((__m256d)splat(bottom), (__m256d)x);
#elif defined(__x86_64__)
  if constexpr (SINGLE) return (V)_mm_max_ps((__m128)splat(bottom), (__m128)x);
  else return (V)_mm_max_pd((__m128d)splat(bottom), (__m128d)x);
#else
  return splat(bottom) > x ? splat(bottom) : x;
#endif
}

// If both are equal, the result is a. If a is NaN, b > a is false, so the result is NaN.
static inline V maximum(V a, V b) { return b != b ? b : b > a ? b : a; }
static inline V minimum(V a, V b) { return b != b ? b : b < a ? b : a; }
static inline V relu(V x) { return at_least(x, 0); }
static inline V sign(V x) { return x > V{} ? splat(1) : x < V{} ? splat(-1) : V{}; }  // 0 for NaN, as in torch
static inline V where(V c, V a, V b) { return c != V{} ? a : b; }
static inline V round_to_float(V x) {
  typedef float Floats __attribute__((vector_size(L * sizeof(float))));
  return __builtin_convertvector(__builtin_convertvector(x, Floats), V);
}
static inline V truth(VI mask) { return mask ? splat(1) : V{}; }

// Returns whether any element is above a bound.
static inline bool any_above(V x, T bound) {
#if defined(__AVX512F__)
  if constexpr (SINGLE) return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
  if constexpr (SINGLE) return _mm256_movemask_ps((__m256)(x > splat(bound))) != 0;
#elif defined(__x86_64__)
  if constexpr (SINGLE) return _mm_movemask_ps((__m128)(x > splat(bound))) != 0;
#elif defined(__aarch64__)
  if constexpr (SINGLE) return vmaxvq_u32((uint32x4_t)(x > splat(bound))) != 0;
#endif
  bool above = false;
  for (int k = 0; k < L; k++) above |= x[k] > bound;
  return above;
}

// The square root is correctly rounded on all of these machines.
template <class W> static inline W root(W x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (W)_mm512_sqrt_ps((__m512)x);
  else return (W)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX__)
  if constexpr (sizeof(x[0]) == 4) return (W)_mm256_sqrt_ps((__m256)x);
  else return (W)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  if constexpr (sizeof(x[0]) == 4) return (W)_mm_sqrt_ps((__m128)x);
  else return (W)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__)
  if constexpr (sizeof(x[0]) == 4) return (W)vsqrtq_f32((float32x4_t)x);
  else return (W)vsqrtq_f64((float64x2_t)x);
#else
  for (size_t k = 0; k < sizeof x / sizeof x[0]; k++) x[k] = std::sqrt(x[k]);
  return x;
#endif
}
static inline V sqrt(V x) { return root(x); }

// From ALL_INTEGERS on, every number is an integer and is returned unchanged, as are infinity and NaN.
constexpr T ALL_INTEGERS = TO_INTEGER / 3 * 2;
static inline V integer_of(V x, V integer) { return absolute(x) < splat(ALL_INTEGERS) ? sign_of(integer, x) : x; }
static inline V nearest(V a) { return (a + splat(ALL_INTEGERS)) - splat(ALL_INTEGERS); }
static inline V round(V x) { return integer_of(x, nearest(absolute(x))); }  // ties to even
static inline V trunc(V x) {
  const V a = absolute(x), n = nearest(a);
  return integer_of(x, n - (n > a ? splat(1) : V{}));
}
static inline V floor(V x) {
  const V n = trunc(x);
  return n - (n > x ? splat(1) : V{});
}
static inline V ceil(V x) { return -floor(-x); }

#define EACH_PAIR(name) \
  static inline V name(V x, V y) { return each(x, y, [](T a, T b) { return std::name(a, b); }); }
EACH_PAIR(fmod)
// The result has the sign of the divisor, as in torch.
static inline V remainder(V x, V y) {
  return each(x, y, [](T a, T b) {
    const T r = std::fmod(a, b);
    return r != 0 && (b < 0) != (r < 0) ? r + b : r;
  });
}

// Returns a vector with the first n lanes of v and the other lanes of `rest`.
static inline V first_lanes(int64_t n, V v, V rest) {
  if (n >= L) return v;
  for (int64_t k = n; k < L; k++) v[k] = rest[k];
  return v;
}
