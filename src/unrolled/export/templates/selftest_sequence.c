int @name@_selftest(@name@_state *state, float *difference) {
  static const @kind@ x[] = {
@x@
};
  static const float expected[] = {
@y@
};
  static float y[@steps@ * @NAME@_OUTPUT], work[@work@]; /* so only one thread may run the test */
  float largest = 0;
  @name@_run(state, x, y, @steps@, work);
  for (int k = 0; k < @steps@ * @NAME@_OUTPUT; k++) {
    const float right = expected[k], distance = y[k] < right ? right - y[k] : y[k] - right;
    if (y[k] == right || (y[k] != y[k] && right != right)) continue; /* also infinity and NaN */
    if (!(distance <= largest)) largest = distance;
  }
  if (difference != NULL) *difference = largest;
  return largest <= @tolerance@ ? 0 : 1;
}
