// Logarithms: x = 2^k (1 + f) with -1/4 <= f < 1/2, and log x = k ln 2 + log(1 + f).
#pragma once
#include "exponential.h"

// Returns log(1 + f) - f = f^2 (f q(f) - 1/2). q is a minimax fit as in exponential.h; error 2^-27.6 relative to
// log(1 + f).
static inline V log1p_rest(V f) {
  const V f2 = f * f, f4 = f2 * f2;
  const V low = fma(f2, fma(f, -0.166471556, 0.199908137), fma(f, -0.250001013, 0.333334506));
  const V high = fma(f2, fma(f, -0.0450530089, 0.104625359), fma(f, -0.131624728, 0.144787818));
  return f2 * fma(f, fma(f4, high, low), -0.5);
}

// k and f of a positive number. For other numbers they are such that the logarithm becomes NaN or infinity.
struct Parts {
  V k, f;
};

static inline Parts parts(V x) {
#if defined(__AVX512F__)
  const __m512 m = _mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  return {(V)_mm512_sub_ps(_mm512_getexp_ps((__m512)x), _mm512_getexp_ps(m)), (V)m - splat(1)};
#else
  const VI small = x < splat(0x1p-126);
  const VI bits = (VI)(small ? x * splat(0x1p23) : x) - 0x3f400000;  // the bits of 3/4
  const VI k = (bits >> 23) - (small & 23);
  return {__builtin_convertvector(k, V), (V)((bits & 0x7fffff) + 0x3f400000) - splat(1)};
#endif
}

// Returns the result if the logarithm is finite, and else its special value.
static inline V logarithm([[maybe_unused]] V x, V result) {
#if defined(__AVX512F__)
  return result;
#else
  const V special = x == V{} ? splat(-INFINITY) : x < V{} ? splat(NAN) : x;
  return ((x > V{}) & (x < splat(INFINITY))) ? result : special;
#endif
}

static inline V log(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::log(v); });
  const auto [k, f] = parts(x);
  return logarithm(x, fma(k, LN_2_HIGH, fma(k, LN_2_LOW, log1p_rest(f)) + f));
}

// The multiple of f is split in two. The first part is exact and added to k first: near 3/4, where k is -1 and f is
// 1/2, the two cancel exactly, and little is left to round.
static inline V log2(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::log2(v); });
  const auto [k, f] = parts(x);
  return logarithm(x, (k + f) + fma(f, LOG2_E - 1, log1p_rest(f) * splat(LOG2_E)));
}

static inline V log10(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::log10(v); });
  constexpr T LOG10_E = 0.43429448190325183, LOG10_2_HIGH = 0.30078125, LOG10_2_LOW = 2.4874566398119521e-4;
  const auto [k, f] = parts(x);
  const V rest = fma(f, LOG10_E - 0.5, log1p_rest(f) * splat(LOG10_E));
  return logarithm(x, fma(k, LOG10_2_HIGH, f * splat(0.5)) + fma(k, LOG10_2_LOW, rest));
}

static inline V log1p(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::log1p(v); });
  // k of 1 + x; f = x / 2^k + (1 / 2^k - 1), which is x itself near 0
  const VI bits = (VI)(x + splat(1)) - 0x3f400000, power = bits & ~0x7fffff;
  const V k = __builtin_convertvector(bits >> 23, V);
  const V two = (V)(0x40000000 - power);  // 2 / 2^k, 0 at its smallest
  const V f = (V)((VI)x - power) + fma(two, 0.5, -1);
  const V result = fma(k, LN_2_HIGH, fma(k, LN_2_LOW, log1p_rest(f)) + f);
  const V special = x == splat(-1) ? splat(-INFINITY) : x < splat(-1) ? splat(NAN) : x;
  return sign_of(((x > splat(-1)) & (x < splat(INFINITY))) ? result : special, x);
}
