  if (@name@_init(&state) != 0) return 1;
