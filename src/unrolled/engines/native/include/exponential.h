// exp and the functions derived from it: sigmoid, tanh, expm1, exp2, sinh, cosh, erf.
//
// They write x as n ln 2 + r with an integer n and |r| <= ln 2 / 2, and use e^x = 2^n (1 + t) with t = e^r - 1. n is
// rounded with TO_INTEGER, so shifting the bits of the sum gives 2^n.
//
// The polynomials here are minimax fits (Lawson's reweighted least squares in 50 digits, coefficients rounded one
// after another). The comments give form, range and largest error of each.
#pragma once
#include "basic_functions.h"

constexpr T LOG2_E = 1.4426950408889634, LN_2 = 0.69314718055994531;
// ln 2 in two parts; multiples of the first are exact. From fdlibm, e_logf.c and e_exp.c.
constexpr T LN_2_HIGH = SINGLE ? 0.693145751953125 : 6.93147180369123816490e-01;
constexpr T LN_2_LOW = SINGLE ? 1.42860682030941723e-6 : 1.90821492927058770002e-10;

// Returns q(r) of e^r - 1 = r + r^2 q(r), |r| <= 0.34661. Relative error: 2^-26.1 in float32, 2^-60.6 in float64. Parts
// of q are independent of one another, to keep the dependency chain short.
static inline V expm1_rest(V r) {
  const V r2 = r * r;
  if constexpr (SINGLE) {
    const V high = fma(r2, splat(0.001393585), fma(r, 0.00836653728, 0.0416664556));
    return fma(r2, high, fma(r, 0.166665435, 0.5));
  } else {
    const V r4 = r2 * r2;
    const V a = fma(r, 0.16666666666666677, 0.5);
    const V b = fma(r, 0.0083333333333216152, 0.041666666666666699);
    const V c = fma(r, 0.00019841269886160137, 0.0013888888888866845);
    const V d = fma(r, 2.7557244180460273e-6, 2.4801587360536526e-5);
    const V e = fma(r2, splat(2.0924437368056414e-9), fma(r, 2.5109045360044408e-8, 2.7557242777922504e-7));
    return fma(r4, fma(r4, e, fma(r2, d, c)), fma(r2, b, a));
  }
}

static inline V small_expm1(V r) { return fma(r * r, expm1_rest(r), r); }

// Returns e^(x - n ln 2) - 1, corrected for the rounding of the difference.
static inline V exact_expm1(V x, V n) {
  const V high = fma(n, -LN_2_HIGH, x), low = n * splat(-LN_2_LOW), r = high + low;
  return r + fma(r * r, expm1_rest(r), (high - r) + low);
}

// small_expm1 with one more rounding but a shorter dependency chain, for results that are added to 1.
static inline V quick_expm1(V r) {
  if constexpr (!SINGLE) return small_expm1(r);
  const V r2 = r * r, high = fma(r2, splat(0.001393585), fma(r, 0.00836653728, 0.0416664556));
  return fma(r2 * r2, high, fma(r2, fma(r, 0.166665435, 0.5), r));
}

// Returns 2^n from the sum that rounded n to an integer, whose last bits are the biased exponent.
static inline V power_of_2(V sum) { return (V)((VI)sum << MANTISSA); }

// Returns p * 2^n for any n, rounded once. 2^n is split into two factors that don't overflow.
static inline V scaled(V p, V n) {
#if defined(__AVX512F__)
  if constexpr (SINGLE) return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
  else return (V)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  const VI power = (VI)(n + splat(TO_INTEGER)) - (VI)splat(TO_INTEGER), half = power >> 1;
  return p * (V)((half + BIAS) << MANTISSA) * (V)((power - half + BIAS) << MANTISSA);
#endif
}

// Returns e^x / 2^halvings.
static inline V exp_halved(V x, int halvings) {
  x = at_least(at_most(x, SINGLE ? 91 : 712), SINGLE ? -105 : -747);
  const V n = fma(x, LOG2_E, TO_INTEGER) - splat(TO_INTEGER);
  const V r = fma(n, -LN_2_LOW, fma(n, -LN_2_HIGH, x));
  return scaled(splat(1) + quick_expm1(r), n - splat(halvings));
}

static inline V exp(V x) { return exp_halved(x, 0); }

static inline V exp2(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::exp2(v); });
  x = at_least(at_most(x, 129), -151);
  const V n = (x + splat(TO_INTEGER)) - splat(TO_INTEGER), r = x - n, r2 = r * r;
  // 2^r - 1 as r ln 2 + r^2 q(r), |r| <= 1 / 2: relative error 2^-26.6
  const V low = fma(r, 0.0555036962, 0.240226507);
  const V high = fma(r2, splat(0.000154539695), fma(r, 0.00133867876, 0.00961808302));
  return scaled(splat(1) + fma(r, LN_2, r2 * fma(r2, high, low)), n);
}

static inline V expm1(V x) {
  // 2^n t + (2^n - 1); near 0, n is 0. If 2^n would overflow, half of it is computed and doubled.
  const V bounded = at_least(at_most(x, SINGLE ? 89 : 710), SINGLE ? -20 : -40);
  const VI large = bounded > splat(SINGLE ? 80 : 700);
  const V sum = fma(bounded, LOG2_E, TO_INTEGER + BIAS), n = sum - splat(TO_INTEGER + BIAS);
  const V power = power_of_2((V)((VI)sum + large)), t = exact_expm1(bounded, n);
  return sign_of(fma(power, t, power - splat(1)) * (large ? splat(2) : splat(1)), x);
}

static inline V sigmoid(V x) {
  // 2^m / (2^m + e^r) with x = m ln 2 - r doesn't overflow, and small results keep their digits. 2^m is computed
  // scaled up by 2^UP, because m may be below the smallest exponent.
  constexpr int UP = MANTISSA + 1;
  constexpr T SUM = TO_INTEGER + BIAS + UP, DOWN = SINGLE ? 0x1p-24 : 0x1p-53;
  x = at_least(at_most(x, SINGLE ? 20 : 40), SINGLE ? -104 : -746);
  const V sum = fma(x, LOG2_E, SUM), m = sum - splat(SUM);
  const V raised = power_of_2(sum), power = raised * splat(DOWN);
  const V rest = fma(m, LN_2_LOW, fma(m, LN_2_HIGH, -x));
  const V r = m <= splat(-UP) ? rest + power : rest;  // here 1 + 2^m would lose 2^m
  return power / (fma(raised, DOWN, 1) + quick_expm1(r));
}

static inline V tanh(V x) {
  // (1 - e^-2a) / (1 + e^-2a) with a = |x|. Near 0, n is 0 and the quotient is t / (2 + t). In float32 a rounded ln 2
  // is precise enough: its error, times n, grows more slowly than e^-2a falls. With fused multiply-adds the result is
  // within 2 units. Without them, both sums are multiplied by 1.375 where the error is largest: higher up in their
  // binades, their relative rounding error is smaller.
  constexpr T SUM = TO_INTEGER + BIAS;
  const V a = at_most(absolute(x), SINGLE ? 10 : 20), twice = a * splat(-2);
  const V sum = fma(a, -2 * LOG2_E, SUM), n = sum - splat(SUM);
  const V t = SINGLE ? small_expm1(fma(n, -LN_2, twice)) : exact_expm1(twice, n);
  V one = splat(1);
  if constexpr (!SINGLE || !FUSED) one = ((a > splat(0.35)) & (a < splat(1))) ? splat(1.375) : one;
  const V power = power_of_2(sum) * one;
  return sign_of(fma(power, t, power - one) / fma(power, t, power + one), x);
}

static inline V sinh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::sinh(v); });
  const V a = absolute(x), z = a * a, half = exp_halved(a, 1);
  // x + x^3 q(x^2), a <= 1: relative error 2^-31.5
  const V q = fma(z * z, fma(z, 2.78392508e-6, 0.000198426351), fma(z, 0.00833331142, 0.166666672));
  return sign_of(a < splat(1) ? fma(a * z, q, a) : half - splat(0.25) / half, x);
}

static inline V cosh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::cosh(v); });
  const V half = exp_halved(absolute(x), 1);
  return half + splat(0.25) / half;
}

static inline V erf(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::erf(v); });
  // 1 - e^-y with y = -log(erfc(a)) = a + a q(a), a = |x| <= 3.95: error of the result 2^-27.8, relative
  const V a = at_most(absolute(x), 3.95), a2 = a * a, a4 = a2 * a2;
  const V low = fma(a2, fma(a, -0.0191477705, 0.102776296), fma(a, 0.636619568, 0.128379166));
  const V high = fma(a2, fma(a, 0.000118893026, -0.000637465564), fma(a, 0.00167583895, -0.000169637307));
  const V q = fma(a4, fma(a4, splat(-9.39179426e-6), high), low), y = fma(a, q, a);
  constexpr T SUM = TO_INTEGER + BIAS;
  const V sum = fma(y, -LOG2_E, SUM), n = sum - splat(SUM), r = fma(n, -LN_2, -y);
  // As in tanh, but with a and a q as separate terms: near 0 only the last sum rounds.
  const V t = fma(n, -LN_2, -a) + fma(r * r, expm1_rest(r), -(a * q));
  const V power = power_of_2(sum);
  return sign_of(fma(power, t, power - splat(1)), x);
}
