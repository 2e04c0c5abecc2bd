  static uint32_t weights[16 + @NAME@_WEIGHTS_BYTES / 4]; /* or map the file */
  FILE *const file = fopen("@name@_weights.bin", "rb");
  const size_t size = file ? fread(weights, 1, sizeof weights, file) : 0;
  if (@name@_init(&state, weights, size) != 0) return 1;
