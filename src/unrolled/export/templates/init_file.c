  if (weights == NULL || size != @NAME@_WEIGHTS_BYTES + 64) return 1;
  const uint32_t *const header = (const uint32_t *)weights;
  if (header[0] != 0x57524e55 || header[1] != @NAME@_FORMAT || header[2] != @NAME@_WEIGHTS_BYTES / 4) return 2;
  state->weights = (const float *)(header + 16);
