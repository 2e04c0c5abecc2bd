int @name@_selftest(@name@_state *state, float *difference) {
  static const @kind@ x[] = {
@x@
};
  static const float expected[] = {
@y@
};
  float y[@NAME@_OUTPUT], largest = 0;
  @name@_reset(state);
  for (int t = 0; t < @steps@; t++) {
    @name@_step(state, x + t * @NAME@_INPUT, y);
    for (int k = 0; k < @NAME@_OUTPUT; k++) {
      const float right = expected[t * @NAME@_OUTPUT + k], distance = y[k] < right ? right - y[k] : y[k] - right;
      if (y[k] == right || (y[k] != y[k] && right != right)) continue; /* also infinity and NaN */
      if (!(distance <= largest)) largest = distance;
    }
  }
  if (difference != NULL) *difference = largest;
  return largest <= @tolerance@ ? 0 : 1;
}
