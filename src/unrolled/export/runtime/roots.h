/* Square roots, correctly rounded. */
#if defined(__clang__)
#if __has_builtin(__builtin_elementwise_sqrt)
#define ELEMENTWISE_SQRT 1
#endif
#endif
ALWAYS_INLINE double soft_root(double x) {
  if (!(x > 0 && x < (double)INFINITY)) return x < 0 ? (double)NAN : x;
  uint64_t bits;
  COPY(&bits, &x, 8);
  bits = (bits >> 1) + ((uint64_t)1023 << 51);
  double y;
  COPY(&y, &bits, 8);
  for (int k = 0; k < 5; k++) y = 0.5 * (y + x / y);
  return y;
}
ALWAYS_INLINE V v_sqrt(V x) {
#if LANES == 16
  return (V)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8
  return (V)_mm256_sqrt_ps((__m256)x);
#elif LANES == 4 && defined(__SSE2__)
  return (V)_mm_sqrt_ps((__m128)x);
#elif LANES == 4 && defined(__aarch64__)
  return (V)vsqrtq_f32((float32x4_t)x);
#elif defined(ELEMENTWISE_SQRT) && (!defined(__arm__) || (__ARM_FP & 4))
  return __builtin_elementwise_sqrt(x);
#elif LANES == 1 && defined(__arm__) && (__ARM_FP & 4)
  V y;
  __asm__("vsqrt.f32 %0, %1" : "=t"(y) : "t"(x));
  return y;
#else
  for (int k = 0; k < LANES; k++) x = v_with_lane(x, k, (float)soft_root((double)v_lane(x, k)));
  return x;
#endif
}
