/* Runs the model for 100 steps and prints its last output. */
#include <stdio.h>
#include <stdlib.h>
#include "@name@.h"

int main(void) {
  static @name@_state state;
@start@  float difference;
  if (@name@_selftest(&state, &difference) != 0) {
    fprintf(stderr, "the self-test failed: the numbers differ by %g\n", difference);
    return 1;
  }
  @name@_reset(&state);
@use@  for (int k = 0; k < @NAME@_OUTPUT; k++) printf("%.9g\n", last[k]);
  return 0;
}
