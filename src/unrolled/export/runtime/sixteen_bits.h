/* Products with matrices in bfloat16 or float16. A word holds the numbers of two consecutive terms. */
ALWAYS_INLINE VI v_load_pairs(const uint32_t *p) { VI v; COPY(&v, p, sizeof v); return v; }
ALWAYS_INLINE V v_low_bfloat16(VI w) { return v_float((VI)((VU)w << 16)); }
ALWAYS_INLINE V v_high_bfloat16(VI w) { return v_float((VI)((VU)w & 0xffff0000u)); }
ALWAYS_INLINE V v_finite_float16(VU half) {
  const V magnitude = v_float((VI)((half & 0x7fffu) << 13)) * splat(5.192296858534828e33f); /* 2^112 */
  return v_float(v_bits(magnitude) | (VI)((half & 0x8000u) << 16));
}
ALWAYS_INLINE V v_low_float16(VI w) { return v_finite_float16((VU)w & 0xffffu); }
ALWAYS_INLINE V v_high_float16(VI w) { return v_finite_float16((VU)w >> 16); }

/* Like multiply(), with the same order of sums. The layout of w is (term / 2, product, column). */
ALWAYS_INLINE void v_multiply_pairs(V *s, const float *x, const uint32_t *w, const int terms, const int products,
                                    const int width, const int column, const int panels, V (*low)(VI), V (*high)(VI)) {
  UNROLL for (int j = 0; j < panels * products; j++) s[j] = splat(0);
  for (int from = 0; from < terms; from += 32) {
    V sum[16];
    UNROLL for (int j = 0; j < panels * products; j++) sum[j] = splat(0);
    const int end = terms - from < 32 ? terms : from + 32;
    for (int k = from; k < end; k += 2) {
      const int last = k + 1 == end;
      const V first = splat(x[k]), second = splat(last ? 0 : x[k + 1]);
      const uint32_t *const line = w + (k / 2 * products * width + column);
      UNROLL for (int j = 0; j < panels * products; j++) {
        const VI both = v_load_pairs(line + j % products * width + j / products * LANES);
        sum[j] = v_fma(low(both), first, sum[j]);
        if (!last) sum[j] = v_fma(high(both), second, sum[j]);
      }
    }
    UNROLL for (int j = 0; j < panels * products; j++) s[j] = from ? s[j] + sum[j] : sum[j];
  }
}
ALWAYS_INLINE void v_multiply_bfloat16(V *s, const float *x, const uint32_t *w, const int terms, const int products,
                                       const int width, const int column, const int panels) {
  v_multiply_pairs(s, x, w, terms, products, width, column, panels, v_low_bfloat16, v_high_bfloat16);
}
ALWAYS_INLINE void v_multiply_float16(V *s, const float *x, const uint32_t *w, const int terms, const int products,
                                      const int width, const int column, const int panels) {
  v_multiply_pairs(s, x, w, terms, products, width, column, panels, v_low_float16, v_high_float16);
}
