/* exp and the functions derived from it: x = n ln 2 + r with an integer n, and e^x = 2^n (1 + t) with t = e^r - 1. */
#define TO_INTEGER 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to an integer */
#define LOG2_E 1.4426950408889634f
#define LN_2 0.69314718055994531f
#define LN_2_HIGH 0.693145751953125f
#define LN_2_LOW 1.42860682030941723e-6f

ALWAYS_INLINE V v_high_terms(V r, V r2) {
  return v_fma(r2, splat(0.001393585f), v_fma(r, splat(0.00836653728f), splat(0.0416664556f)));
}
ALWAYS_INLINE V v_expm1_rest(V r) {
  const V r2 = r * r;
  return v_fma(r2, v_high_terms(r, r2), v_fma(r, splat(0.166665435f), splat(0.5f)));
}
ALWAYS_INLINE V v_small_expm1(V r) { return v_fma(r * r, v_expm1_rest(r), r); }
ALWAYS_INLINE V v_exact_expm1(V x, V n) {
  const V high = v_fma(n, splat(-LN_2_HIGH), x), low = n * splat(-LN_2_LOW), r = high + low;
  return r + v_fma(r * r, v_expm1_rest(r), (high - r) + low);
}
ALWAYS_INLINE V v_quick_expm1(V r) {
  const V r2 = r * r;
  return v_fma(r2 * r2, v_high_terms(r, r2), v_fma(r2, v_fma(r, splat(0.166665435f), splat(0.5f)), r));
}
/* 2^n from the sum that rounded n to an integer. */
ALWAYS_INLINE V v_power_of_2(V sum) { return v_float((VI)((VU)v_bits(sum) << 23)); }
/* p 2^n, rounded once. */
ALWAYS_INLINE V v_scaled(V p, V n) {
#if LANES == 16
  return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VI power = v_bits(n + splat(TO_INTEGER)) - v_bits(splat(TO_INTEGER)), half = power >> 1;
  return p * v_float((VI)((VU)(half + 127) << 23)) * v_float((VI)((VU)(power - half + 127) << 23));
#endif
}
ALWAYS_INLINE V v_exp_halved(V x, float halvings) {
  x = v_at_least(v_at_most(x, 91), -105);
  const V n = v_fma(x, splat(LOG2_E), splat(TO_INTEGER)) - splat(TO_INTEGER);
  const V r = v_fma(n, splat(-LN_2_LOW), v_fma(n, splat(-LN_2_HIGH), x));
  return v_scaled(splat(1) + v_quick_expm1(r), n - splat(halvings));
}
ALWAYS_INLINE V v_exp(V x) { return v_exp_halved(x, 0); }
ALWAYS_INLINE V v_exp2(V x) {
  x = v_at_least(v_at_most(x, 129), -151);
  const V n = (x + splat(TO_INTEGER)) - splat(TO_INTEGER), r = x - n, r2 = r * r;
  const V low = v_fma(r, splat(0.0555036962f), splat(0.240226507f));
  const V high = v_fma(r2, splat(0.000154539695f), v_fma(r, splat(0.00133867876f), splat(0.00961808302f)));
  return v_scaled(splat(1) + v_fma(r, splat(LN_2), r2 * v_fma(r2, high, low)), n);
}
ALWAYS_INLINE V v_expm1(V x) {
  const V bounded = v_at_least(v_at_most(x, 89), -20);
  const VI large = v_below(splat(80), bounded);
  const V sum = v_fma(bounded, splat(LOG2_E), splat(TO_INTEGER + 127)), n = sum - splat(TO_INTEGER + 127);
  const V power = v_power_of_2(v_float(v_bits(sum) + large)), t = v_exact_expm1(bounded, n);
  return v_sign_of(v_fma(power, t, power - splat(1)) * v_choose(large, splat(2), splat(1)), x);
}
ALWAYS_INLINE V v_sigmoid(V x) {
  x = v_at_least(v_at_most(x, 20), -104);
  const V top = splat(TO_INTEGER + 127 + 24), sum = v_fma(x, splat(LOG2_E), top), m = sum - top;
  const V raised = v_power_of_2(sum), power = raised * splat(0x1p-24f);
  const V rest = v_fma(m, splat(LN_2_LOW), v_fma(m, splat(LN_2_HIGH), -x));
  const V r = v_choose(v_below(splat(-24), m), rest, rest + power);
  return power / (v_fma(raised, splat(0x1p-24f), splat(1)) + v_quick_expm1(r));
}
ALWAYS_INLINE V v_tanh(V x) {
  const V top = splat(TO_INTEGER + 127), a = v_at_most(v_absolute(x), 10), twice = a * splat(-2);
  const V sum = v_fma(a, splat(-2 * LOG2_E), top), n = sum - top;
  const V t = v_small_expm1(v_fma(n, splat(-LN_2), twice));
  V one = splat(1);
#if !FUSED
  one = v_choose(v_below(splat(0.35f), a) & v_below(a, splat(1)), splat(1.375f), one);
#endif
  const V power = v_power_of_2(sum) * one;
  return v_sign_of(v_fma(power, t, power - one) / v_fma(power, t, power + one), x);
}
ALWAYS_INLINE V v_sinh(V x) {
  const V a = v_absolute(x), z = a * a, half = v_exp_halved(a, 1);
  const V high = v_fma(z, splat(2.78392508e-6f), splat(0.000198426351f));
  const V q = v_fma(z * z, high, v_fma(z, splat(0.00833331142f), splat(0.166666672f)));
  return v_sign_of(v_choose(v_below(a, splat(1)), v_fma(a * z, q, a), half - splat(0.25f) / half), x);
}
ALWAYS_INLINE V v_cosh(V x) {
  const V half = v_exp_halved(v_absolute(x), 1);
  return half + splat(0.25f) / half;
}
ALWAYS_INLINE V v_erf(V x) {
  const V a = v_at_most(v_absolute(x), 3.95f), a2 = a * a, a4 = a2 * a2;
  const V low = v_fma(a2, v_fma(a, splat(-0.0191477705f), splat(0.102776296f)),
                      v_fma(a, splat(0.636619568f), splat(0.128379166f)));
  const V high = v_fma(a2, v_fma(a, splat(0.000118893026f), splat(-0.000637465564f)),
                       v_fma(a, splat(0.00167583895f), splat(-0.000169637307f)));
  const V q = v_fma(a4, v_fma(a4, splat(-9.39179426e-6f), high), low), y = v_fma(a, q, a);
  const V top = splat(TO_INTEGER + 127), sum = v_fma(y, splat(-LOG2_E), top), n = sum - top;
  const V r = v_fma(n, splat(-LN_2), -y);
  const V t = v_fma(n, splat(-LN_2), -a) + v_fma(r * r, v_expm1_rest(r), -(a * q));
  const V power = v_power_of_2(sum);
  return v_sign_of(v_fma(power, t, power - splat(1)), x);
}
