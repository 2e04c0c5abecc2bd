/* The WebAssembly of @name@: one state, and room for the input and output of some steps. */
#include "@name@.h"

enum { STEPS = @steps@ };
static @name@_state state;
static @x@ x[STEPS * @NAME@_INPUT];
static float y[STEPS * @NAME@_OUTPUT];
@work@
#define EXPORT(name) __attribute__((export_name(#name), used))
EXPORT(init) int init(void) { return @name@_init(&state); }
EXPORT(reset) void reset(void) { @name@_reset(&state); }
EXPORT(run) void run(int steps) { @name@_run(&state, x, y, (size_t)steps@argument@); }
EXPORT(selftest) int selftest(void) { return @name@_selftest(&state, NULL); }
EXPORT(input) @x@ *input(void) { return x; }
EXPORT(output) float *output(void) { return y; }
EXPORT(input_size) int input_size(void) { return @NAME@_INPUT; }
EXPORT(output_size) int output_size(void) { return @NAME@_OUTPUT; }
EXPORT(causal) int causal(void) { return @causal@; }
EXPORT(most_steps) int most_steps(void) { return STEPS; }

/* What the compiler may call without a C library. */
void *memset(void *to, int value, size_t size) {
  for (volatile char *p = (volatile char *)to; size; size--) *p++ = (char)value;
  return to;
}
void *memcpy(void *restrict to, const void *restrict from, size_t size) {
  const char *q = (const char *)from;
  for (volatile char *p = (volatile char *)to; size; size--) *p++ = *q++;
  return to;
}
