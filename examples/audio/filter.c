/* Applies the effect to a WAV file: filter IN.wav OUT.wav. It supports mono files with 16 bits, and prints the
 * computing time as a percentage of the duration of the sound. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "effect.h"

static int fail(const char *message, const char *what) {
  fprintf(stderr, "filter: %s: %s\n", what, message);
  return 1;
}

static uint32_t number(const unsigned char *bytes, int count) {
  uint32_t value = 0;
  for (int k = 0; k < count; k++) value |= (uint32_t)bytes[k] << (8 * k);
  return value;
}

/* Copies the header, up to the samples. Returns their size in bytes, or 0 if the file isn't supported. */
static uint32_t copy_header(FILE *in, FILE *out, uint32_t *rate) {
  unsigned char head[12], chunk[8], format[40];
  if (fread(head, 1, 12, in) != 12 || memcmp(head, "RIFF", 4) || memcmp(head + 8, "WAVE", 4)) return 0;
  fwrite(head, 1, 12, out);
  *rate = 0;
  while (fread(chunk, 1, 8, in) == 8) {
    const uint32_t size = number(chunk + 4, 4);
    fwrite(chunk, 1, 8, out);
    if (memcmp(chunk, "data", 4) == 0) return *rate ? size : 0;
    const int is_format = memcmp(chunk, "fmt ", 4) == 0;
    if (is_format && (size < 16 || size > sizeof format)) return 0;
    for (uint32_t k = 0; k < size + size % 2; k++) { /* chunks have an even size */
      const int one = fgetc(in);
      if (one == EOF) return 0;
      if (is_format && k < sizeof format) format[k] = (unsigned char)one;
      fputc(one, out);
    }
    if (is_format) {
      if (number(format, 2) != 1 || number(format + 2, 2) != 1 || number(format + 14, 2) != 16) return 0;
      *rate = number(format + 4, 4);
    }
  }
  return 0;
}

int main(int count, char **arguments) {
  static effect_state state;
  unsigned char block[2 * 128];
  float x[128], y[128];
  uint32_t rate;
  if (count != 3) return fail("filter IN.wav OUT.wav", "usage");
  FILE *const in = fopen(arguments[1], "rb");
  if (in == NULL) return fail("can't be read", arguments[1]);
  FILE *const out = fopen(arguments[2], "wb");
  if (out == NULL) return fail("can't be written", arguments[2]);
  uint32_t left = copy_header(in, out, &rate);
  if (left == 0) return fail("expected a WAV file with one channel and 16 bits", arguments[1]);
  if (effect_init(&state) != 0) return fail("the weights don't fit the code", "effect");
  double seconds = 0, samples = 0;
  while (left > 0) {
    const size_t wanted = left < sizeof block ? left : sizeof block, got = fread(block, 1, wanted, in) / 2;
    if (got == 0) break;
    for (size_t t = 0; t < got; t++) x[t] = (float)(int16_t)number(block + 2 * t, 2) / 32768.0f;
    const clock_t start = clock();
    effect_run(&state, x, y, got); /* as in an audio callback */
    seconds += (double)(clock() - start) / CLOCKS_PER_SEC;
    samples += (double)got;
    for (size_t t = 0; t < got; t++) {
      const float scaled = y[t] * 32768.0f, limited = scaled < -32768 ? -32768 : scaled > 32767 ? 32767 : scaled;
      const int16_t sample = (int16_t)(limited < 0 ? limited - 0.5f : limited + 0.5f);
      block[2 * t] = (unsigned char)(sample & 255), block[2 * t + 1] = (unsigned char)((uint16_t)sample >> 8);
    }
    fwrite(block, 1, 2 * got, out);
    left -= (uint32_t)(2 * got);
  }
  if (fclose(out) != 0) return fail("can't be written", arguments[2]);
  fclose(in);
  printf("%.2f s of sound, load %.2f %% of real time\n", samples / rate, 100 * seconds * rate / samples);
  return 0;
}
