// exp and what is made of it: sigmoid, tanh, expm1, exp2, sinh, cosh, erf.
//
// All of them write a number as n ln 2 + r with a whole n and |r| <= ln 2 / 2, and use e^x = 2^n (1 + t)
// with t = e^r - 1. n comes from TO_WHOLE, so that shifting the bits of the sum makes 2^n.
//
// The polynomials here are minimax fits (Lawson's reweighted least squares in 50 digits, coefficients
// rounded one after another); each states its form, range and largest error.
#pragma once
#include "plain.h"

constexpr T LOG2_E = 1.4426950408889634, LN_2 = 0.69314718055994531;
// ln 2 in two parts, a multiple of the first exact: fdlibm, e_logf.c and e_exp.c.
constexpr T LN_2_HIGH = SINGLE ? 0.693145751953125 : 6.93147180369123816490e-01;
constexpr T LN_2_LOW = SINGLE ? 1.42860682030941723e-6 : 1.90821492927058770002e-10;

// e^r - 1 = r + r^2 q(r), |r| <= 0.34661: relative error 2^-26.1 in float32, 2^-60.6 in float64. Parts of q are
// computed beside one another, to keep the chain short.
static inline V little_rest(V r) {
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

static inline V little_expm1(V r) { return fma(r * r, little_rest(r), r); }

// e^(x - n ln 2) - 1, with what the difference loses in rounding.
static inline V exact_expm1(V x, V n) {
  const V most = fma(n, -LN_2_HIGH, x), low = n * splat(-LN_2_LOW), r = most + low;
  return r + fma(r * r, little_rest(r), (most - r) + low);
}

// little_expm1 rounded once more, where that does no harm, in a shorter chain.
static inline V quick_expm1(V r) {
  if constexpr (!SINGLE) return little_expm1(r);
  const V r2 = r * r, high = fma(r2, splat(0.001393585), fma(r, 0.00836653728, 0.0416664556));
  return fma(r2 * r2, high, fma(r2, fma(r, 0.166665435, 0.5), r));
}

// 2^n where the sum that n was rounded in ends in the exponent's bits.
static inline V power_of_2(V sum) { return (V)((VI)sum << MANTISSA); }

// p * 2^n for any n, rounded once: two factors, neither of which leaves the range.
static inline V scaled(V p, V n) {
#if defined(__AVX512F__)
  if constexpr (SINGLE) return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
  else return (V)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  const VI whole = (VI)(n + splat(TO_WHOLE)) - (VI)splat(TO_WHOLE), half = whole >> 1;
  return p * (V)((half + BIAS) << MANTISSA) * (V)((whole - half + BIAS) << MANTISSA);
#endif
}

// e^x / 2^less
static inline V exp_less(V x, int less) {
  x = at_least(at_most(x, SINGLE ? 91 : 712), SINGLE ? -105 : -747);
  const V n = fma(x, LOG2_E, TO_WHOLE) - splat(TO_WHOLE);
  const V r = fma(n, -LN_2_LOW, fma(n, -LN_2_HIGH, x));
  return scaled(splat(1) + quick_expm1(r), n - splat(less));
}

static inline V exp(V x) { return exp_less(x, 0); }

static inline V exp2(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::exp2(v); });
  x = at_least(at_most(x, 129), -151);
  const V n = (x + splat(TO_WHOLE)) - splat(TO_WHOLE), r = x - n, r2 = r * r;
  // 2^r - 1 as r ln 2 + r^2 q(r), |r| <= 1 / 2: relative error 2^-26.6
  const V low = fma(r, 0.0555036962, 0.240226507);
  const V high = fma(r2, splat(0.000154539695), fma(r, 0.00133867876, 0.00961808302));
  return scaled(splat(1) + fma(r, LN_2, r2 * fma(r2, high, low)), n);
}

static inline V expm1(V x) {
  // 2^n t + (2^n - 1), where near 0 n is 0; half of it where 2^n would be infinite
  const V bounded = at_least(at_most(x, SINGLE ? 89 : 710), SINGLE ? -20 : -40);
  const VI large = bounded > splat(SINGLE ? 80 : 700);
  const V sum = fma(bounded, LOG2_E, TO_WHOLE + BIAS), n = sum - splat(TO_WHOLE + BIAS);
  const V power = power_of_2((V)((VI)sum + large)), t = exact_expm1(bounded, n);
  return sign_of(fma(power, t, power - splat(1)) * (large ? splat(2) : splat(1)), x);
}

static inline V sigmoid(V x) {
  // 2^m / (2^m + e^r) with x = m ln 2 - r: no overflow, and small results keep their digits. 2^m is made
  // UP powers of 2 larger than it is, since m goes below the smallest exponent.
  constexpr int UP = MANTISSA + 1;
  constexpr T SUM = TO_WHOLE + BIAS + UP, DOWN = SINGLE ? 0x1p-24 : 0x1p-53;
  x = at_least(at_most(x, SINGLE ? 20 : 40), SINGLE ? -104 : -746);
  const V sum = fma(x, LOG2_E, SUM), m = sum - splat(SUM);
  const V raised = power_of_2(sum), power = raised * splat(DOWN);
  const V rest = fma(m, LN_2_LOW, fma(m, LN_2_HIGH, -x));
  const V r = m <= splat(-UP) ? rest + power : rest;  // there 1 + 2^m would lose 2^m
  return power / (fma(raised, DOWN, 1) + quick_expm1(r));
}

static inline V tanh(V x) {
  // (1 - e^-2a) / (1 + e^-2a), a = |x|: near 0 n is 0 and the quotient t / (2 + t). In float32 one ln 2 is enough,
  // since what it lacks grows slower than e^-2a falls; and fused it is within 2 units as it is, otherwise where
  // the error is largest both sums are taken 1.375 times: higher up in their binades, they round less.
  constexpr T SUM = TO_WHOLE + BIAS;
  const V a = at_most(absolute(x), SINGLE ? 10 : 20), twice = a * splat(-2);
  const V sum = fma(a, -2 * LOG2_E, SUM), n = sum - splat(SUM);
  const V t = SINGLE ? little_expm1(fma(n, -LN_2, twice)) : exact_expm1(twice, n);
  V one = splat(1);
  if constexpr (!SINGLE || !FUSED) one = ((a > splat(0.35)) & (a < splat(1))) ? splat(1.375) : one;
  const V power = power_of_2(sum) * one;
  return sign_of(fma(power, t, power - one) / fma(power, t, power + one), x);
}

static inline V sinh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::sinh(v); });
  const V a = absolute(x), z = a * a, half = exp_less(a, 1);
  // x + x^3 q(x^2), a <= 1: relative error 2^-31.5
  const V q = fma(z * z, fma(z, 2.78392508e-6, 0.000198426351), fma(z, 0.00833331142, 0.166666672));
  return sign_of(a < splat(1) ? fma(a * z, q, a) : half - splat(0.25) / half, x);
}

static inline V cosh(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::cosh(v); });
  const V half = exp_less(absolute(x), 1);
  return half + splat(0.25) / half;
}

static inline V erf(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::erf(v); });
  // 1 - e^-y with y = -log(erfc(a)) = a + a q(a), a = |x| <= 3.95: error of the result 2^-27.8, relative
  const V a = at_most(absolute(x), 3.95), a2 = a * a, a4 = a2 * a2;
  const V low = fma(a2, fma(a, -0.0191477705, 0.102776296), fma(a, 0.636619568, 0.128379166));
  const V high = fma(a2, fma(a, 0.000118893026, -0.000637465564), fma(a, 0.00167583895, -0.000169637307));
  const V q = fma(a4, fma(a4, splat(-9.39179426e-6), high), low), y = fma(a, q, a);
  constexpr T SUM = TO_WHOLE + BIAS;
  const V sum = fma(y, -LOG2_E, SUM), n = sum - splat(SUM), r = fma(n, -LN_2, -y);
  // as in tanh, but with a and a q apart: near 0 only the last sum rounds
  const V t = fma(n, -LN_2, -a) + fma(r * r, little_rest(r), -(a * q));
  const V power = power_of_2(sum);
  return sign_of(fma(power, t, power - splat(1)), x);
}
