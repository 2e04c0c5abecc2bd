// The functions of one element, on vectors: float32 within 2 units in the last place, float64 by libm.
#pragma once
#include "vectors.h"

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

static inline V absolute(V x) {
  return (V)((VI)x & (VI{} + std::numeric_limits<I>::max()));
}

static inline V sign_of(V magnitude, V sign) {
  VI bit = VI{} + std::numeric_limits<I>::min();
  return (V)(((VI)magnitude & ~bit) | ((VI)sign & bit));
}

static inline V exp(V x) {
  if constexpr (sizeof(T) == 8) return each(x, [](T v) { return std::exp(v); });
  // x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its series to r^7 / 7!, whose remainder is below
  // 0.1 ulp; 2^n in two factors, so that subnormal results and infinity come out right.
  V bounded = x > splat(T(89)) ? splat(T(89)) : x;  // NaN stays: it compares false
  bounded = bounded < splat(T(-105)) ? splat(T(-105)) : bounded;
  const V round = splat(T(12582912));  // 1.5 * 2^23: adding it leaves the nearest whole number
  V n = fma(bounded, splat(T(1.44269504088896341)), round) - round;
  V r = fma(n, splat(T(-0.693359375)), bounded);      // ln 2 in two parts (Cephes, expf)
  r = fma(n, splat(T(2.12194440054690583e-4)), r);
  V p = splat(T(1.0 / 5040));
  p = fma(p, r, splat(T(1.0 / 720)));
  p = fma(p, r, splat(T(1.0 / 120)));
  p = fma(p, r, splat(T(1.0 / 24)));
  p = fma(p, r, splat(T(1.0 / 6)));
  p = fma(p, r, splat(T(0.5)));
  p = fma(p, r, splat(T(1)));
  p = fma(p, r, splat(T(1)));
  V known = x == x ? n : V{};
  VI whole = __builtin_convertvector(known, VI), half = whole >> 1;
  constexpr int bits = sizeof(T) == 4 ? 23 : 52, bias = sizeof(T) == 4 ? 127 : 1023;
  p = p * (V)((half + bias) << bits) * (V)((whole - half + bias) << bits);
  return x == x ? p : x;
}

static inline V sigmoid(V x) {
  if constexpr (sizeof(T) == 8)
    return each(x, [](T v) { T e = std::exp(-std::fabs(v)); return (v < 0 ? e : T(1)) / (T(1) + e); });
  const V one = splat(T(1)), e = exp(-absolute(x));  // never overflows, keeps small results precise
  V d = one + e, lost = e - (d - one);                 // what rounding d dropped, exactly
  V above = x < V{} ? e : one, q = above / d;
  V left = fma(-q, d, above) - q * lost;               // the remainder of the division
  return fma(left, x < V{} ? one - q : q, q);          // 1 / d is q, or 1 - q
}

static inline V tanh(V x) {
  if constexpr (sizeof(T) == 8) return each(x, [](T v) { return std::tanh(v); });
  V a = absolute(x), z = x * x;
  // near 0 an odd polynomial (Cephes, tanhf), where 1 - 2 / (exp(2x) + 1) would cancel
  V p = splat(T(-5.70498872745e-3));
  p = fma(p, z, splat(T(2.06390887954e-2)));
  p = fma(p, z, splat(T(-5.37397155531e-2)));
  p = fma(p, z, splat(T(1.33314422036e-1)));
  p = fma(p, z, splat(T(-3.33332819422e-1)));
  V near = fma(p * z, x, x);
  V far = splat(T(1)) - splat(T(2)) / (exp(a + a) + splat(T(1)));
  return a < splat(T(0.625)) ? near : x == x ? sign_of(far, x) : x;
}

static inline V relu(V x) { return x < V{} ? V{} : x; }
static inline V sqrt(V x) { return each(x, [](T v) { return std::sqrt(v); }); }

#define EACH(name) \
  static inline V name(V x) { return each(x, [](T v) { return std::name(v); }); }
EACH(log) EACH(log1p) EACH(log2) EACH(log10) EACH(expm1) EACH(exp2) EACH(sin) EACH(cos) EACH(tan) EACH(asin)
EACH(acos) EACH(atan) EACH(sinh) EACH(cosh) EACH(asinh) EACH(acosh) EACH(atanh) EACH(erf) EACH(erfc) EACH(floor)
EACH(ceil) EACH(trunc)
#undef EACH
static inline V round(V x) { return each(x, [](T v) { return std::nearbyint(v); }); }

#define EACH_PAIR(name) \
  static inline V name(V x, V y) { return each(x, y, [](T a, T b) { return std::name(a, b); }); }
EACH_PAIR(pow) EACH_PAIR(fmod) EACH_PAIR(atan2) EACH_PAIR(hypot)
#undef EACH_PAIR
// The sign of the divisor, as torch has it.
static inline V remainder(V x, V y) {
  return each(x, y, [](T a, T b) {
    const T left = std::fmod(a, b);
    return left != 0 && (b < 0) != (left < 0) ? left + b : left;
  });
}
static inline V sign(V x) { return x > V{} ? splat(T(1)) : x < V{} ? splat(T(-1)) : x == x ? V{} : x; }
static inline V maximum(V a, V b) { return a != a ? a : b != b ? b : a > b ? a : b; }
static inline V minimum(V a, V b) { return a != a ? a : b != b ? b : a < b ? a : b; }
static inline V where(V c, V a, V b) { return c != V{} ? a : b; }
static inline V truth(VI mask) { return mask ? splat(T(1)) : V{}; }
// The first n lanes of a vector, and of another beyond them.
static inline V first(long n, V v, V beyond) {
  if (n >= L) return v;
  for (long k = n; k < L; k++) v[k] = beyond[k];
  return v;
}
