/* Sine, cosine and tangent, and their inverses. For a = n pi / 2 + r, the sine and cosine of r, and n. */
#define HALF_PI 1.57079632679489662
#define HALF_PI_HIGH ((float)HALF_PI)
#define HALF_PI_LOW ((float)(HALF_PI - (double)HALF_PI_HIGH))
#define MAX_REDUCED (FUSED ? 65536.0f : 12800.0f)

typedef struct { V sine, cosine; VI n; } Reduced;
ALWAYS_INLINE Reduced v_reduce(V a) {
  const V sum = v_fma(a, splat((float)(1 / HALF_PI)), splat(TO_INTEGER)), n = sum - splat(TO_INTEGER);
#if FUSED
  const V first = v_fma(n, splat(-HALF_PI_HIGH), a);
  const V r = v_fma(n, splat(1.71512451e-15f), v_fma(n, splat(-HALF_PI_LOW), first));
#else
  const V second = v_fma(n, splat(-0x1.fb4p-12f), v_fma(n, splat(-0x1.92p0f), a)), product = n * splat(0x1.444p-24f);
  const V third = second - product;
  const V r = third + (((second - third) - product) - n * splat(0x1.68c234p-39f));
#endif
  const V z = r * r, z2 = z * z;
  const V low = v_fma(z, splat(0.00833219104f), splat(-0.166666552f));
  const V sine = v_fma(r * z, v_fma(z2, splat(-0.000195186003f), low), r);
  const V q = v_fma(z2, splat(2.44319526e-5f), v_fma(z, splat(-0.00138873071f), splat(0.0416666456f)));
  const Reduced reduced = {sine, v_fma(z2, q, v_fma(z, splat(-0.5f), splat(1))), v_bits(sum)};
  return reduced;
}

/* The same for one large number, in double: a is multiplied by the bits of 2 / pi that matter (Payne and Hanek). */
typedef struct { double sine, cosine; int n; } ReducedLarge;
static ReducedLarge reduce_large(float a) {
  static const uint32_t two_over_pi[] = {0, 0xa2f9836e, 0x4e441529, 0xfc2757d1, 0xf534ddc0, 0xdb629599, 0x3c439041};
  uint32_t bits;
  COPY(&bits, &a, 4);
  const uint64_t mantissa = (bits & 0x7fffff) | 0x800000;
  const int skipped = (int)(bits >> 23 & 255) - 150 - 2 + 32, word = skipped / 32, shift = skipped % 32;
  uint64_t part[3];
  for (int k = 0; k < 3; k++) {
    const uint64_t pair = (uint64_t)two_over_pi[word + k] << 32 | (word + k < 6 ? two_over_pi[word + k + 1] : 0);
    part[k] = (uint32_t)(pair >> (32 - shift));
  }
  const uint64_t turns = (mantissa * part[0] << 32) + mantissa * part[1] + (mantissa * part[2] >> 32);
  const uint64_t n = (turns + ((uint64_t)1 << 61)) >> 62;
  const double r = (double)(int64_t)(turns - (n << 62)) * (HALF_PI * 0x1p-62), z = r * r;
  const double s = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 +
                   z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)));
  const double c = -1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 +
                   z * (2.08757232129817482790e-09 - z * 1.13596475577881948265e-11)));
  const ReducedLarge reduced = {r + r * z * (-1.66666666666666324348e-01 + z * s),
                                1 - 0.5 * z + z * z * (4.16666666666666019037e-02 + z * c), (int)(n & 3)};
  return reduced;
}
typedef enum { SINE, COSINE, TANGENT } Trigonometric;
static float of_large(float x, Trigonometric kind) {
  const float a = x < 0 ? -x : x;
  if (!(a < INFINITY)) return NAN;
  const ReducedLarge large = reduce_large(a);
  const double sine = large.n & 1 ? large.cosine : large.sine, cosine = large.n & 1 ? -large.sine : large.cosine;
  const double y = kind == SINE ? sine : kind == COSINE ? cosine : sine / cosine;
  const int turned = kind != TANGENT && large.n & 2;
  return (float)(turned != (kind != COSINE && x < 0) ? -y : y);
}
ALWAYS_INLINE V v_with_large(V x, V y, Trigonometric kind) {
  for (int k = 0; k < LANES; k++) {
    const float one = v_lane(x, k);
    if (one > MAX_REDUCED || one < -MAX_REDUCED) y = v_with_lane(y, k, of_large(one, kind));
  }
  return y;
}

ALWAYS_INLINE V v_sin(V x) {
  const Reduced p = v_reduce(v_absolute(x));
  const V y = v_choose(-(p.n & 1), p.cosine, p.sine);
  return v_with_large(x, v_float(v_bits(y) ^ ((VI)((VU)p.n << 30) & INT32_MIN) ^ v_sign_bit(x)), SINE);
}
ALWAYS_INLINE V v_cos(V x) {
  const Reduced p = v_reduce(v_absolute(x));
  const V y = v_choose(-(p.n & 1), p.sine, p.cosine);
  return v_with_large(x, v_float(v_bits(y) ^ ((VI)((VU)(p.n + 1) << 30) & INT32_MIN)), COSINE);
}
ALWAYS_INLINE Wide w_tan(Wide a, Wide unused) {
  (void)unused;
  const Wide top = w_splat(6755399441055744.0), sum = w_fma(a, w_splat(1 / HALF_PI), top), n = sum - top;
  const Wide r = a - n * w_splat(1.57079632673412561417e+00) - n * w_splat(6.07710050650619224932e-11), z = r * r;
  const Wide low = w_fma(z, w_splat(-0.000195186003), w_splat(0.00833219104));
  const Wide sine = w_fma(r * z, w_fma(z, low, w_splat(-0.166666552)), r);
  const Wide q = w_fma(z, w_fma(z, w_splat(2.44319526e-5), w_splat(-0.00138873071)), w_splat(0.0416666456));
  const Wide cosine = w_fma(z * z, q, w_fma(z, w_splat(-0.5), w_splat(1)));
  const WideI odd = -(w_bits(sum) & 1);
  return w_choose(odd, -cosine, sine) / w_choose(odd, sine, cosine);
}
ALWAYS_INLINE V v_tan(V x) {
  const V a = v_absolute(x), y = v_wide(w_tan, a, a);
  return v_with_large(x, v_float(v_bits(y) ^ v_sign_bit(x)), TANGENT);
}

/* asin(b) - b for 0 <= b <= 1 / 2 and z = b^2 */
ALWAYS_INLINE V v_asin_rest(V b, V z) {
  const V high = v_fma(z, v_fma(z, splat(0.0422103181f), splat(0.0241528768f)), splat(0.0454759076f));
  return b * z * v_fma(z * z, high, v_fma(z, splat(0.0749525279f), splat(0.166667536f)));
}
ALWAYS_INLINE V v_asin(V x) {
  const V a = v_absolute(x), rest = splat(0.5f) - a * splat(0.5f);
  const VI small = v_below(a, splat(0.5f));
  const V b = v_choose(small, a, v_sqrt(rest)), more = v_asin_rest(b, v_choose(small, a * a, rest));
  const V half = splat(HALF_PI_HIGH / 2), over = (b + b - half) + (more + more - splat(HALF_PI_LOW));
  return v_sign_of(v_choose(small, b + more, half - over), x);
}
ALWAYS_INLINE V v_acos(V x) {
  const V a = v_absolute(x), rest = splat(0.5f) - a * splat(0.5f);
  const VI small = v_below(a, splat(0.5f));
  const V b = v_choose(small, a, v_sqrt(rest)), y = b + v_asin_rest(b, v_choose(small, a * a, rest));
  const V middle = splat(HALF_PI_HIGH) - (v_sign_of(y, x) - splat(HALF_PI_LOW));
  const V low = splat(2 * HALF_PI_HIGH) - ((y + y) - splat(2 * HALF_PI_LOW));
  return v_choose(small, middle, v_choose(v_below(x, splat(0)), low, y + y));
}
/* atan(q) for 0 <= q <= 1 */
ALWAYS_INLINE V v_small_atan(V q) {
  const V z = q * q, z2 = z * z, z4 = z2 * z2;
  const V low = v_fma(z2, v_fma(z, splat(0.109512158f), splat(-0.142640561f)),
                      v_fma(z, splat(0.19998531f), splat(-0.333332986f)));
  const V high = v_fma(z2, v_fma(z, splat(0.010888963f), splat(-0.0311299637f)),
                       v_fma(z, splat(0.0579093993f), splat(-0.0840062574f)));
  return v_fma(q * z, v_fma(z4, v_fma(z4, splat(-0.00178790151f), high), low), q);
}
ALWAYS_INLINE V v_atan(V x) {
  const V a = v_absolute(x);
  const VI large = v_below(splat(1), a);
  const V y = v_small_atan(v_choose(large, splat(1) / a, a));
  return v_sign_of(v_choose(large, splat(HALF_PI_HIGH) - (y - splat(HALF_PI_LOW)), y), x);
}
ALWAYS_INLINE V v_atan2(V y, V x) {
  const V b = v_absolute(y), a = v_absolute(x);
  const VI steep = v_below(a, b);
  const V less = v_choose(steep, a, b), more = v_choose(steep, b, a);
  const V one = v_choose(v_equal(less, splat(0)), splat(0), splat(1)); /* also 0 / 0 and inf / inf */
  V r = v_small_atan(v_choose(v_equal(less, more), one, less / more));
  r = v_choose(steep, splat(HALF_PI_HIGH) - (r - splat(HALF_PI_LOW)), r);
  r = v_choose(v_bits(x) >> 31, splat(2 * HALF_PI_HIGH) - (r - splat(2 * HALF_PI_LOW)), r);
  return v_choose(v_equal(x, x) & v_equal(y, y), v_sign_of(r, y), x + y);
}
