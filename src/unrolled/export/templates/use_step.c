  float last[@NAME@_OUTPUT];
  for (int t = 0; t < 100; t++) {
    @x@ x[@NAME@_INPUT];
    for (int k = 0; k < @NAME@_INPUT; k++) x[k] = @value@;
    @name@_step(&state, x, last);
  }
