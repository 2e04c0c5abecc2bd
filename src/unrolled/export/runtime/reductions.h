/* Reductions of the columns of a value: lane by lane first, then over the lanes in order. */
ALWAYS_INLINE V v_add(V a, V b) { return a + b; }
ALWAYS_INLINE V v_multiply(V a, V b) { return a * b; }
ALWAYS_INLINE float v_over_lanes(V (*combine)(V, V), V all) {
  V one = all;
  for (int k = 1; k < LANES; k++) one = combine(one, splat(v_lane(all, k)));
  return v_lane(one, 0);
}
