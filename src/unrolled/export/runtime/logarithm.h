/* Logarithms: x = 2^k (1 + f) with -1/4 <= f < 1/2, and log x = k ln 2 + log(1 + f). */
#define LOG10_E 0.43429448190325183f
#define LOG10_2_HIGH 0.30078125f
#define LOG10_2_LOW 2.4874566398119521e-4f

ALWAYS_INLINE V v_log1p_rest(V f) {
  const V f2 = f * f, f4 = f2 * f2;
  const V low = v_fma(f2, v_fma(f, splat(-0.166471556f), splat(0.199908137f)),
                      v_fma(f, splat(-0.250001013f), splat(0.333334506f)));
  const V high = v_fma(f2, v_fma(f, splat(-0.0450530089f), splat(0.104625359f)),
                       v_fma(f, splat(-0.131624728f), splat(0.144787818f)));
  return f2 * v_fma(f, v_fma(f4, high, low), splat(-0.5f));
}
typedef struct { V k, f; } LogarithmParts;
ALWAYS_INLINE LogarithmParts v_parts(V x) {
  const VI small = v_below(x, splat(0x1p-126f));
  const VI bits = v_bits(v_choose(small, x * splat(0x1p23f), x)) - 0x3f400000; /* the bits of 3/4 */
  const VI k = (bits >> 23) - (small & 23);
  const LogarithmParts parts = {v_number(k), v_float((bits & 0x7fffff) + 0x3f400000) - splat(1)};
  return parts;
}
/* The result where the logarithm is finite, and else its special value. */
ALWAYS_INLINE V v_logarithm(V x, V result) {
  const V negative = v_choose(v_below(x, splat(0)), splat(NAN), x);
  const V special = v_choose(v_equal(x, splat(0)), splat(-INFINITY), negative);
  return v_choose(v_below(splat(0), x) & v_below(x, splat(INFINITY)), result, special);
}
ALWAYS_INLINE V v_log(V x) {
  const LogarithmParts p = v_parts(x);
  const V low = v_fma(p.k, splat(LN_2_LOW), v_log1p_rest(p.f)) + p.f;
  return v_logarithm(x, v_fma(p.k, splat(LN_2_HIGH), low));
}
ALWAYS_INLINE V v_log2(V x) {
  const LogarithmParts p = v_parts(x);
  const V rest = v_fma(p.f, splat(LOG2_E - 1), v_log1p_rest(p.f) * splat(LOG2_E));
  return v_logarithm(x, (p.k + p.f) + rest);
}
ALWAYS_INLINE V v_log10(V x) {
  const LogarithmParts p = v_parts(x);
  const V rest = v_fma(p.f, splat(LOG10_E - 0.5f), v_log1p_rest(p.f) * splat(LOG10_E));
  return v_logarithm(x, v_fma(p.k, splat(LOG10_2_HIGH), p.f * splat(0.5f)) + v_fma(p.k, splat(LOG10_2_LOW), rest));
}
ALWAYS_INLINE V v_log1p(V x) {
  const VI bits = v_bits(x + splat(1)) - 0x3f400000, power = bits & ~0x7fffff;
  const V k = v_number(bits >> 23), two = v_float(0x40000000 - power);
  const V f = v_float(v_bits(x) - power) + v_fma(two, splat(0.5f), splat(-1));
  const V result = v_fma(k, splat(LN_2_HIGH), v_fma(k, splat(LN_2_LOW), v_log1p_rest(f)) + f);
  const V below = v_choose(v_below(x, splat(-1)), splat(NAN), x);
  const V special = v_choose(v_equal(x, splat(-1)), splat(-INFINITY), below);
  return v_sign_of(v_choose(v_below(splat(-1), x) & v_below(x, splat(INFINITY)), result, special), x);
}
