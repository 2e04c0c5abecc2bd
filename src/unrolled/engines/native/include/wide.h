// Functions of float32 that need more digits in between: computed in float64 and rounded once.
//
// The polynomials are minimax fits as in exponential.h.
#pragma once
#include "basic_functions.h"

// Applies f to both halves of vectors, converted to float64.
template <class F, class... X> static inline V wide(F f, X... x) {
  typedef float Half __attribute__((vector_size(BYTES / 2)));
  V y;
  for (int part = 0; part < 2; part++) {
    const auto half = [part](V v) {
      Half h;
      std::memcpy(&h, (const char*)&v + part * sizeof h, sizeof h);
      return __builtin_convertvector(h, Wide);
    };
    const Half h = __builtin_convertvector(f(half(x)...), Half);
    std::memcpy((char*)&y + part * sizeof h, &h, sizeof h);
  }
  return y;
}

// Returns 2^z with error 2^-34. z is clamped to the range of float.
static inline Wide wide_exp2(Wide z) {
  constexpr double SUM = 6755399441055744 + 1023;  // as in exponential.h
  z = z > as<Wide>(130) ? as<Wide>(130) : z;
  z = z < as<Wide>(-160) ? as<Wide>(-160) : z;
  const Wide sum = z + as<Wide>(SUM), r = z - (sum - as<Wide>(SUM)), r2 = r * r;
  // 2^r - 1 as r ln 2 + r^2 q(r), |r| <= 1 / 2
  const Wide a = fma(r, 0.055504109230252681, 0.24022651072958121);
  const Wide b = fma(r, 0.0013333456249252662, 0.0096180372285801265);
  const Wide c = fma(r, 1.5309884096613073e-5, 0.00015467028863338806);
  const Wide q = fma(r2, fma(r2, c, b), a), p = fma(r2, q, fma(r, 0.69314718055994531, 1));
  return p * (Wide)((WideI)sum << 52);
}

// Returns log(1 + f), |f| <= 1/3, as 2 s + s^3 q(s^2) with s = f / (2 + f); relative error 2^-42.
static inline Wide wide_small_log1p(Wide f) {
  const Wide s = f / (f + as<Wide>(2)), z = s * s, z2 = z * z;
  const Wide low = fma(z, 0.39999984303263142, 0.66666666711491862);
  const Wide high = fma(z2, as<Wide>(0.20132373984454377), fma(z, 0.22134239412063636, 0.28573210982440422));
  return fma(s * z, fma(z2, high, low), s + s);
}

typedef uint64_t WideBits __attribute__((vector_size(BYTES)));  // may overflow, for infinity and invalid arguments

// Returns k of y = 2^k m with 2/3 <= m < 4/3, in the exponent's bits.
static inline WideI wide_exponent(Wide y) {
  return (WideI)((WideBits)y - (uint64_t)0x3fe5555555555555) & ~0xfffffffffffff;
}

// Returns an exponent, given in the exponent's bits, as a number: the last bits of 2^52 + k are those of the integer k.
static inline Wide wide_number(WideI exponent) {
  const WideI biased = (WideI)(((WideBits)exponent + ((uint64_t)1024 << 52)) >> 52);
  return (Wide)(biased | 0x4330000000000000) - as<Wide>(4503599627370496 + 1024);
}

// Returns log(1 + x) for x > -1.
static inline Wide wide_log1p(Wide x) {
  const WideI exponent = wide_exponent(x + as<Wide>(1));
  const Wide one = (Wide)((uint64_t)0x3ff0000000000000 - (WideBits)exponent), f = fma(x, one, one - as<Wide>(1));
  return fma(wide_number(exponent), 0.69314718055994531, wide_small_log1p(f));
}

static inline V pow(V x, V y) {
  // libm is faster if a vector holds only two doubles
  if constexpr (!SINGLE || BYTES < 32) return each(x, y, [](T a, T b) { return std::pow(a, b); });
  const V a = absolute(x), half = y * splat(0.5);
  V p = wide(
      [](Wide a, Wide y) {
        const WideI exponent = wide_exponent(a);
        const Wide f = (Wide)((WideI)a - exponent) - as<Wide>(1);
        Wide log2 = fma(wide_small_log1p(f), 1.4426950408889634, wide_number(exponent));
        log2 = a == Wide{} ? as<Wide>(-INFINITY) : a < as<Wide>(INFINITY) ? log2 : a;
        return wide_exp2(y * log2);
      },
      a, y);
  p = ((a == splat(1)) & (y == y)) ? splat(1) : p;  // even if y is infinite
  const VI integer = trunc(y) == y, odd = integer & (trunc(half) != half);
  p = (V)((VI)p | (odd & sign_bit(x)));
  p = ((x < V{}) & (a < splat(INFINITY)) & ~integer & (y == y)) ? splat(NAN) : p;
  return ((x == splat(1)) | (y == V{})) ? splat(1) : p;
}

static inline V hypot(V x, V y) {
  if constexpr (!SINGLE) return each(x, y, [](T a, T b) { return std::hypot(a, b); });
  const V r = wide([](Wide x, Wide y) { return root(x * x + y * y); }, x, y);
  return ((absolute(x) == splat(INFINITY)) | (absolute(y) == splat(INFINITY))) ? splat(INFINITY) : r;
}

static inline V asinh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::asinh(v); });
  const V a = absolute(x);
  const V r = wide(
      [](Wide a) {
        const Wide z = a * a;
        return wide_log1p(a + z / (root(z + as<Wide>(1)) + as<Wide>(1)));
      },
      a);
  return a < splat(INFINITY) ? sign_of(r, x) : x;
}

static inline V acosh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::acosh(v); });
  const V r = wide(
      [](Wide x) {
        const Wide above = x - as<Wide>(1);
        return wide_log1p(above + root(above * (x + as<Wide>(1))));
      },
      x);
  return x < splat(1) ? splat(NAN) : x < splat(INFINITY) ? r : x;
}

static inline V atanh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::atanh(v); });
  const V a = absolute(x);
  const V r = wide([](Wide a) { return as<Wide>(0.5) * wide_log1p((a + a) / (as<Wide>(1) - a)); }, a);
  return a < splat(1) ? sign_of(r, x) : a == splat(1) ? sign_of(splat(INFINITY), x) : a == a ? splat(NAN) : x;
}

static inline V erfc(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::erfc(v); });
  return wide(
      [](Wide x) {
        Wide a = x < Wide{} ? -x : x;
        a = a > as<Wide>(10.15) ? as<Wide>(10.15) : a;  // from here on, erfc is below half of the smallest float
        // e^-a^2 p(t), t = (a - 4) / (a + 4), a <= 10.2: relative error 2^-32
        const Wide t = (a - as<Wide>(4)) / (a + as<Wide>(4)), t2 = t * t, t4 = t2 * t2;
        const Wide low = fma(t2, fma(t, -0.16425778806654665, 0.21871968146064602),
                             fma(t, -0.25906804923997373, 0.13699945761570079));
        const Wide middle = fma(t2, fma(t, -0.012839748225828047, 0.031299799455433062),
                                fma(t, -0.063108332832727335, 0.10896309587418689));
        const Wide high = fma(t2, fma(t, 0.0001015073898807872, -2.8261300827759441e-5),
                              fma(t, -0.00081510832453647337, 0.0040587073765792642));
        const Wide p = fma(t4, fma(t4, high, middle), low);
        const Wide y = p * wide_exp2(a * a * as<Wide>(-1.4426950408889634));
        return x < Wide{} ? as<Wide>(2) - y : y;
      },
      x);
}
