// What every generated loop stands on: vectors of the machine's width, and functions of them.
//
// T is the scalar (float or double), V a vector of L of them. Nothing is contracted by the compiler
// (-ffp-contract=off): a fused multiply-add stands where fma() is written, so that a row gets the
// same bits in whatever tile it is computed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int BYTES = 16, REGISTERS = 32;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

template <class T> struct Int;
template <> struct Int<float> { using type = int32_t; };
template <> struct Int<double> { using type = int64_t; };

using I = Int<T>::type;
constexpr int L = BYTES / sizeof(T);
typedef T V __attribute__((vector_size(BYTES)));
typedef I VI __attribute__((vector_size(BYTES)));

static inline V splat(T x) { return x - V{}; }

static inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The first n of L elements, the others 0.
static inline V load(const T* p, long n) {
  if (__builtin_expect(n >= L, 1)) return load(p);
  V v{};
  for (long k = 0; k < n; k++) v[k] = p[k];
  return v;
}

static inline void store(T* p, V v, long n) {
  if (__builtin_expect(n >= L, 1)) {
    std::memcpy(p, &v, sizeof v);
    return;
  }
  for (long k = 0; k < n; k++) p[k] = v[k];
}

static inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

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
static inline V log(V x) { return each(x, [](T v) { return std::log(v); }); }
static inline V log1p(V x) { return each(x, [](T v) { return std::log1p(v); }); }
static inline V expm1(V x) { return each(x, [](T v) { return std::expm1(v); }); }
static inline V sin(V x) { return each(x, [](T v) { return std::sin(v); }); }
static inline V cos(V x) { return each(x, [](T v) { return std::cos(v); }); }
static inline V erf(V x) { return each(x, [](T v) { return std::erf(v); }); }
static inline V pow(V x, V y) { return each(x, y, [](T a, T b) { return std::pow(a, b); }); }
static inline V sign(V x) { return x > V{} ? splat(T(1)) : x < V{} ? splat(T(-1)) : x == x ? V{} : x; }
static inline V maximum(V a, V b) { return a != a ? a : b != b ? b : a > b ? a : b; }
static inline V minimum(V a, V b) { return a != a ? a : b != b ? b : a < b ? a : b; }
static inline V where(V c, V a, V b) { return c != V{} ? a : b; }
static inline V truth(VI mask) { return mask ? splat(T(1)) : V{}; }
static inline T total(V v, long n) {
  T s = 0;
  for (long k = 0; k < n && k < L; k++) s += v[k];
  return s;
}
