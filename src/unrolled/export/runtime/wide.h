/* Functions that need more digits in between: computed in double and rounded once. */
#if LANES == 1
typedef double Wide;
typedef int64_t WideI;
typedef uint64_t WideU;
ALWAYS_INLINE WideI w_bits(Wide x) { WideI i; COPY(&i, &x, 8); return i; }
ALWAYS_INLINE Wide w_double(WideI i) { Wide x; COPY(&x, &i, 8); return x; }
ALWAYS_INLINE Wide w_splat(double x) { return x; }
ALWAYS_INLINE WideI w_below(Wide a, Wide b) { return -(WideI)(a < b); }
ALWAYS_INLINE WideI w_equal(Wide a, Wide b) { return -(WideI)(a == b); }
ALWAYS_INLINE Wide w_choose(WideI mask, Wide a, Wide b) { return mask ? a : b; }
#else
typedef double Wide __attribute__((vector_size(4 * LANES)));
typedef int64_t WideI __attribute__((vector_size(4 * LANES)));
typedef uint64_t WideU __attribute__((vector_size(4 * LANES)));
ALWAYS_INLINE WideI w_bits(Wide x) { return (WideI)x; }
ALWAYS_INLINE Wide w_double(WideI i) { return (Wide)i; }
ALWAYS_INLINE Wide w_splat(double x) { return x - (Wide){0}; }
ALWAYS_INLINE WideI w_below(Wide a, Wide b) { return (WideI)(a < b); }
ALWAYS_INLINE WideI w_equal(Wide a, Wide b) { return (WideI)(a == b); }
ALWAYS_INLINE Wide w_choose(WideI mask, Wide a, Wide b) { return (Wide)((mask & (WideI)a) | (~mask & (WideI)b)); }
#endif

ALWAYS_INLINE Wide w_fma(Wide a, Wide b, Wide c) {
#if LANES == 16
  return (Wide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif LANES == 8 && FUSED
  return (Wide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif LANES == 4 && defined(__aarch64__)
  return (Wide)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif LANES == 1 && FUSED && (!defined(__arm__) || (__ARM_FP & 8))
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
ALWAYS_INLINE Wide w_sqrt(Wide x) {
#if LANES == 16
  return (Wide)_mm512_sqrt_pd((__m512d)x);
#elif LANES == 8
  return (Wide)_mm256_sqrt_pd((__m256d)x);
#elif LANES == 4 && defined(__SSE2__)
  return (Wide)_mm_sqrt_pd((__m128d)x);
#elif LANES == 4 && defined(__aarch64__)
  return (Wide)vsqrtq_f64((float64x2_t)x);
#elif LANES == 1
  return soft_root(x);
#else
  for (int k = 0; k < LANES / 2; k++) x[k] = soft_root(x[k]);
  return x;
#endif
}
/* f(x, y) of both halves of two vectors, converted to double. */
ALWAYS_INLINE V v_wide(Wide (*f)(Wide, Wide), V x, V y) {
#if LANES == 1
  return (V)f((double)x, (double)y);
#else
  typedef float Half __attribute__((vector_size(2 * LANES)));
  V result = splat(0);
  UNROLL for (int part = 0; part < 2; part++) {
    Half a, b;
    COPY(&a, (const char *)&x + part * sizeof a, sizeof a);
    COPY(&b, (const char *)&y + part * sizeof b, sizeof b);
    a = __builtin_convertvector(f(__builtin_convertvector(a, Wide), __builtin_convertvector(b, Wide)), Half);
    COPY((char *)&result + part * sizeof a, &a, sizeof a);
  }
  return result;
#endif
}

ALWAYS_INLINE Wide w_exp2(Wide z) {
  const Wide top = w_splat(6755399441055744.0 + 1023);
  z = w_choose(w_below(w_splat(130), z), w_splat(130), z);
  z = w_choose(w_below(z, w_splat(-160)), w_splat(-160), z);
  const Wide sum = z + top, r = z - (sum - top), r2 = r * r;
  const Wide a = w_fma(r, w_splat(0.055504109230252681), w_splat(0.24022651072958121));
  const Wide b = w_fma(r, w_splat(0.0013333456249252662), w_splat(0.0096180372285801265));
  const Wide c = w_fma(r, w_splat(1.5309884096613073e-5), w_splat(0.00015467028863338806));
  const Wide q = w_fma(r2, w_fma(r2, c, b), a);
  const Wide p = w_fma(r2, q, w_fma(r, w_splat(0.69314718055994531), w_splat(1)));
  return p * w_double((WideI)((WideU)w_bits(sum) << 52));
}
/* log(1 + f), |f| <= 1/3 */
ALWAYS_INLINE Wide w_small_log1p(Wide f) {
  const Wide s = f / (f + w_splat(2)), z = s * s, z2 = z * z;
  const Wide low = w_fma(z, w_splat(0.39999984303263142), w_splat(0.66666666711491862));
  const Wide middle = w_fma(z, w_splat(0.22134239412063636), w_splat(0.28573210982440422));
  const Wide high = w_fma(z2, w_splat(0.20132373984454377), middle);
  return w_fma(s * z, w_fma(z2, high, low), s + s);
}
/* k of y = 2^k m with 2/3 <= m < 4/3, in the exponent's bits, and as a number */
ALWAYS_INLINE WideI w_exponent(Wide y) { return (w_bits(y) - 0x3fe5555555555555) & ~(int64_t)0xfffffffffffff; }
ALWAYS_INLINE Wide w_number(WideI exponent) {
  const WideI biased = (WideI)((WideU)(exponent + ((int64_t)1024 << 52)) >> 52);
  return w_double(biased | 0x4330000000000000) - w_splat(4503599627370496.0 + 1024);
}
ALWAYS_INLINE Wide w_log1p(Wide x) {
  const WideI exponent = w_exponent(x + w_splat(1));
  const Wide one = w_double(0x3ff0000000000000 - exponent), f = w_fma(x, one, one - w_splat(1));
  return w_fma(w_number(exponent), w_splat(0.69314718055994531), w_small_log1p(f));
}

ALWAYS_INLINE Wide w_pow(Wide a, Wide y) {
  const WideI exponent = w_exponent(a);
  const Wide f = w_double(w_bits(a) - exponent) - w_splat(1);
  Wide log2 = w_fma(w_small_log1p(f), w_splat(1.4426950408889634), w_number(exponent));
  log2 = w_choose(w_below(a, w_splat((double)INFINITY)), log2, a);
  log2 = w_choose(w_equal(a, w_splat(0)), w_splat(-(double)INFINITY), log2);
  return w_exp2(y * log2);
}
ALWAYS_INLINE V v_pow(V x, V y) {
  const V a = v_absolute(x), half = y * splat(0.5f);
  const VI y_is_number = v_equal(y, y);
  V p = v_wide(w_pow, a, y);
  p = v_choose(v_equal(a, splat(1)) & y_is_number, splat(1), p); /* even if y is infinite */
  const VI integer = v_equal(v_trunc(y), y), odd = integer & ~v_equal(v_trunc(half), half);
  p = v_float(v_bits(p) | (odd & v_sign_bit(x)));
  const VI invalid = v_below(x, splat(0)) & v_below(a, splat(INFINITY)) & ~integer & y_is_number;
  p = v_choose(invalid, splat(NAN), p);
  return v_choose(v_equal(x, splat(1)) | v_equal(y, splat(0)), splat(1), p);
}
ALWAYS_INLINE Wide w_hypot(Wide x, Wide y) { return w_sqrt(x * x + y * y); }
ALWAYS_INLINE V v_hypot(V x, V y) {
  const VI infinite = v_equal(v_absolute(x), splat(INFINITY)) | v_equal(v_absolute(y), splat(INFINITY));
  return v_choose(infinite, splat(INFINITY), v_wide(w_hypot, x, y));
}
ALWAYS_INLINE Wide w_asinh(Wide a, Wide unused) {
  (void)unused;
  const Wide z = a * a;
  return w_log1p(a + z / (w_sqrt(z + w_splat(1)) + w_splat(1)));
}
ALWAYS_INLINE V v_asinh(V x) {
  const V a = v_absolute(x);
  return v_choose(v_below(a, splat(INFINITY)), v_sign_of(v_wide(w_asinh, a, a), x), x);
}
ALWAYS_INLINE Wide w_acosh(Wide x, Wide unused) {
  (void)unused;
  const Wide above = x - w_splat(1);
  return w_log1p(above + w_sqrt(above * (x + w_splat(1))));
}
ALWAYS_INLINE V v_acosh(V x) {
  const V r = v_choose(v_below(x, splat(INFINITY)), v_wide(w_acosh, x, x), x);
  return v_choose(v_below(x, splat(1)), splat(NAN), r);
}
ALWAYS_INLINE Wide w_atanh(Wide a, Wide unused) {
  (void)unused;
  return w_splat(0.5) * w_log1p((a + a) / (w_splat(1) - a));
}
ALWAYS_INLINE V v_atanh(V x) {
  const V a = v_absolute(x), outside = v_choose(v_equal(a, a), splat(NAN), x);
  const V end = v_choose(v_equal(a, splat(1)), v_sign_of(splat(INFINITY), x), outside);
  return v_choose(v_below(a, splat(1)), v_sign_of(v_wide(w_atanh, a, a), x), end);
}
ALWAYS_INLINE Wide w_erfc(Wide x, Wide unused) {
  (void)unused;
  Wide a = w_choose(w_below(x, w_splat(0)), -x, x);
  a = w_choose(w_below(w_splat(10.15), a), w_splat(10.15), a);
  const Wide t = (a - w_splat(4)) / (a + w_splat(4)), t2 = t * t, t4 = t2 * t2;
  const Wide low = w_fma(t2, w_fma(t, w_splat(-0.16425778806654665), w_splat(0.21871968146064602)),
                         w_fma(t, w_splat(-0.25906804923997373), w_splat(0.13699945761570079)));
  const Wide middle = w_fma(t2, w_fma(t, w_splat(-0.012839748225828047), w_splat(0.031299799455433062)),
                            w_fma(t, w_splat(-0.063108332832727335), w_splat(0.10896309587418689)));
  const Wide high = w_fma(t2, w_fma(t, w_splat(0.0001015073898807872), w_splat(-2.8261300827759441e-5)),
                          w_fma(t, w_splat(-0.00081510832453647337), w_splat(0.0040587073765792642)));
  const Wide p = w_fma(t4, w_fma(t4, high, middle), low);
  const Wide y = p * w_exp2(a * a * w_splat(-1.4426950408889634));
  return w_choose(w_below(x, w_splat(0)), w_splat(2) - y, y);
}
ALWAYS_INLINE V v_erfc(V x) { return v_wide(w_erfc, x, x); }
