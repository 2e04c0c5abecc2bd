  static @x@ x[100 * @NAME@_INPUT];
  static float y[100 * @NAME@_OUTPUT], work[100 * @NAME@_WORK + 1];
  for (int t = 0; t < 100; t++)
    for (int k = 0; k < @NAME@_INPUT; k++) x[t * @NAME@_INPUT + k] = @value@;
  @name@_run(&state, x, y, 100, work);
  const float *const last = y + 99 * @NAME@_OUTPUT;
