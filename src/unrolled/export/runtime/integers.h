/* Rounding to integers, and remainders. From 2^23 on, every number is an integer. */
#define ALL_INTEGERS 8388608.0f
ALWAYS_INLINE V v_integer_of(V x, V integer) {
  return v_choose(v_below(v_absolute(x), splat(ALL_INTEGERS)), v_sign_of(integer, x), x);
}
ALWAYS_INLINE V v_nearest(V a) { return (a + splat(ALL_INTEGERS)) - splat(ALL_INTEGERS); }
ALWAYS_INLINE V v_round(V x) { return v_integer_of(x, v_nearest(v_absolute(x))); } /* ties to even */
ALWAYS_INLINE V v_trunc(V x) {
  const V a = v_absolute(x), n = v_nearest(a);
  return v_integer_of(x, n - v_truth(v_below(a, n)));
}
ALWAYS_INLINE V v_floor(V x) {
  const V n = v_trunc(x);
  return n - v_truth(v_below(x, n));
}
ALWAYS_INLINE V v_ceil(V x) { return -v_floor(-x); }

/* The exact remainder of |x| / |y|, with the sign of x: a long division in binary. */
static inline float fmod_of(float x, float y) {
  const V a = v_absolute(splat(x)), b = v_absolute(splat(y));
  const float high = v_lane(a, 0), low = v_lane(b, 0);
  if (!(high < INFINITY) || !(low > 0)) return NAN;
  if (!(low < INFINITY) || high < low) return x;
  double rest = (double)high, divisor = (double)low; /* products with powers of two are exact */
  while (divisor * 2 <= rest) divisor *= 2;
  for (; divisor >= (double)low; divisor *= 0.5)
    if (rest >= divisor) rest -= divisor;
  return v_lane(v_sign_of(splat((float)rest), splat(x)), 0);
}
ALWAYS_INLINE V v_fmod(V x, V y) {
  for (int k = 0; k < LANES; k++) x = v_with_lane(x, k, fmod_of(v_lane(x, k), v_lane(y, k)));
  return x;
}
/* The result has the sign of the divisor, as in torch. */
ALWAYS_INLINE V v_remainder(V x, V y) {
  for (int k = 0; k < LANES; k++) {
    const float b = v_lane(y, k), r = fmod_of(v_lane(x, k), b);
    x = v_with_lane(x, k, r != 0 && (b < 0) != (r < 0) ? r + b : r);
  }
  return x;
}
