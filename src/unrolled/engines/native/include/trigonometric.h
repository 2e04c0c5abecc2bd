// Sine, cosine and tangent, and their inverses.
//
// The polynomials are minimax fits as in exponential.h.
#pragma once
#include "wide.h"

constexpr double HALF_PI = 1.57079632679489662;
constexpr float HALF_PI_HIGH = HALF_PI, HALF_PI_LOW = HALF_PI - HALF_PI_HIGH;

// For a = n pi / 2 + r with |r| <= pi / 4: the sine and cosine of r, and the last bits of n.
struct Reduced {
  V sine, cosine;
  VI n;
};

constexpr T MAX_REDUCED = FUSED ? 65536 : 12800;

static inline Reduced reduce(V a) {
  const V sum = fma(a, 1 / HALF_PI, TO_INTEGER), n = sum - splat(TO_INTEGER);
  V r;
  if constexpr (FUSED) {
    // pi / 2 as three floats; a minus the first product is exact, because the two nearly cancel
    r = fma(n, 1.71512451e-15, fma(n, -HALF_PI_LOW, fma(n, -HALF_PI_HIGH, a)));
  } else {
    // pi / 2 as four floats. All but the last have 11 bits: with n below 2^13 the products with them are exact. The
    // rounding error of the third difference is added to the fourth product.
    const V second = fma(n, -0x1.fb4p-12, fma(n, -0x1.92p0, a)), product = n * splat(0x1.444p-24);
    const V third = second - product;
    r = third + (((second - third) - product) - n * splat(0x1.68c234p-39));
  }
  const V z = r * r, z2 = z * z;
  // r + r^3 q(z) and 1 - z / 2 + z^2 q(z), relative errors 2^-28 and 2^-33
  const V sine = fma(r * z, fma(z2, splat(-0.000195186003), fma(z, 0.00833219104, -0.166666552)), r);
  const V q = fma(z2, splat(2.44319526e-5), fma(z, -0.00138873071, 0.0416666456));
  return {sine, fma(z2, q, fma(z, -0.5, 1)), (VI)sum};
}

// Returns f(x) for elements above MAX_REDUCED, and y for the others.
__attribute__((noinline, cold)) static V libm_for_large(V x, V y, double (*f)(double)) {
  for (int k = 0; k < L; k++)
    if (std::fabs(x[k]) > MAX_REDUCED) y[k] = (T)f((double)x[k]);
  return y;
}

static inline V with_large(V x, V y, double (*f)(double)) {
  return __builtin_expect(any_above(absolute(x), MAX_REDUCED), 0) ? libm_for_large(x, y, f) : y;
}

static inline V sin(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::sin(v); });
  const auto [sine, cosine, n] = reduce(absolute(x));
  const V y = (V)((VI)(n & 1 ? cosine : sine) ^ (n << 30 & INT32_MIN) ^ sign_bit(x));
  return with_large(x, y, std::sin);
}

static inline V cos(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::cos(v); });
  const auto [sine, cosine, n] = reduce(absolute(x));
  const V y = (V)((VI)(n & 1 ? sine : cosine) ^ ((n + 1) << 30 & INT32_MIN));
  return with_large(x, y, std::cos);
}

// Returns a - n pi / 2. pi / 2 is split into its first 33 bits and the rest, as in fdlibm, e_rem_pio2.c.
static inline Wide minus_quarter_turns(Wide a, Wide n) {
  return a - n * as<Wide>(1.57079632673412561417e+00) - n * as<Wide>(6.07710050650619224932e-11);
}

static inline V tan(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::tan(v); });
  const auto quotient = [](Wide a) {
    const Wide sum = fma(a, 1 / HALF_PI, 6755399441055744), n = sum - as<Wide>(6755399441055744);
    const Wide r = minus_quarter_turns(a, n), z = r * r;
    const Wide sine = fma(r * z, fma(z, fma(z, -0.000195186003, 0.00833219104), -0.166666552), r);
    const Wide q = fma(z, fma(z, 2.44319526e-5, -0.00138873071), 0.0416666456);
    const Wide cosine = fma(z * z, q, fma(z, -0.5, 1));
    const WideI odd = ((WideI)sum & 1) != 0;
    return (odd ? -cosine : sine) / (odd ? sine : cosine);
  };
  const V y = wide(quotient, absolute(x));
  return with_large(x, (V)((VI)y ^ sign_bit(x)), std::tan);
}

// Returns asin(b) - b for 0 <= b <= 1 / 2 and z = b^2, as b^3 q(z); error 2^-27.5 relative to asin(b).
static inline V asin_rest(V b, V z) {
  const V high = fma(z, fma(z, 0.0422103181, 0.0241528768), 0.0454759076);
  return b * z * fma(z * z, high, fma(z, 0.0749525279, 0.166667536));
}

// Near 1, asin(a) is pi / 2 - 2 asin(sqrt((1 - a) / 2)).
static inline V asin(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::asin(v); });
  const V a = absolute(x), rest = splat(0.5) - a * splat(0.5);
  const VI small = a < splat(0.5);
  const V b = small ? a : sqrt(rest), more = asin_rest(b, small ? a * a : rest);
  const V half = splat(HALF_PI_HIGH / 2), over = (b + b - half) + (more + more - splat(HALF_PI_LOW));
  return sign_of(small ? b + more : half - over, x);
}

static inline V acos(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::acos(v); });
  const V a = absolute(x), rest = splat(0.5) - a * splat(0.5);
  const VI small = a < splat(0.5);
  const V b = small ? a : sqrt(rest), y = b + asin_rest(b, small ? a * a : rest);
  const V middle = splat(HALF_PI_HIGH) - (sign_of(y, x) - splat(HALF_PI_LOW));
  const V low = splat(2 * HALF_PI_HIGH) - ((y + y) - splat(2 * HALF_PI_LOW));
  return small ? middle : x < V{} ? low : y + y;
}

// Returns atan(q) for 0 <= q <= 1, as q + q^3 p(q^2); relative error 2^-28.5.
static inline V small_atan(V q) {
  const V z = q * q, z2 = z * z, z4 = z2 * z2;
  const V low = fma(z2, fma(z, 0.109512158, -0.142640561), fma(z, 0.19998531, -0.333332986));
  const V high = fma(z2, fma(z, 0.010888963, -0.0311299637), fma(z, 0.0579093993, -0.0840062574));
  return fma(q * z, fma(z4, fma(z4, splat(-0.00178790151), high), low), q);
}

static inline V atan(V x) {
  if constexpr (!SINGLE) return each(x, [](T v) { return std::atan(v); });
  const V a = absolute(x);
  const VI large = a > splat(1);
  const V y = small_atan(large ? splat(1) / a : a);
  return sign_of(large ? splat(HALF_PI_HIGH) - (y - splat(HALF_PI_LOW)) : y, x);
}

static inline V atan2(V y, V x) {
  if constexpr (!SINGLE) return each(y, x, [](T a, T b) { return std::atan2(a, b); });
  const V b = absolute(y), a = absolute(x);
  const VI steep = b > a;
  const V less = steep ? a : b, more = steep ? b : a;
  V r = small_atan(less == more ? (less == V{} ? V{} : splat(1)) : less / more);  // also 0 / 0, inf / inf
  r = steep ? splat(HALF_PI_HIGH) - (r - splat(HALF_PI_LOW)) : r;
  r = sign_bit(x) != 0 ? splat(2 * HALF_PI_HIGH) - (r - splat(2 * HALF_PI_LOW)) : r;
  return ((x == x) & (y == y)) ? sign_of(r, y) : x + y;
}
