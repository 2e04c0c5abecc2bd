/* Runs an exported model on a Cortex-M without a C library: input and output are in semihosting calls. Prints the
 * result of the self-test, the bytes of stack that a step used, and the outputs of some steps, all in hexadecimal. */
#include "m.h"

extern uint32_t stack_top[];
enum { STACK = 16384, STEPS = 20, WRITE = 4, EXIT = 24, STOPPED = 0x20026 };

static void call_host(int what, const void *argument) {
  register int r0 __asm__("r0") = what;
  register const void *r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}
static void print(uint32_t value) {
  char text[10];
  for (int k = 0; k < 8; k++) text[k] = "0123456789abcdef"[value >> (28 - 4 * k) & 15];
  text[8] = '\n', text[9] = 0;
  call_host(WRITE, text);
}

/* The compiler's names for copies of memory. */
void *memset(void *to, int value, size_t size);
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void __aeabi_memclr4(void *to, size_t size) { memset(to, 0, size); }
void __aeabi_memclr(void *to, size_t size) { memset(to, 0, size); }
void __aeabi_memcpy4(void *to, const void *from, size_t size) { memcpy(to, from, size); }
void __aeabi_memcpy(void *to, const void *from, size_t size) { memcpy(to, from, size); }
void __aeabi_unwind_cpp_pr0(void) {}
void __aeabi_unwind_cpp_pr1(void) {}

static m_state state;
static float x[M_INPUT], y[M_OUTPUT];

static __attribute__((noinline)) void run(void) {
  m_init(&state);
  print((uint32_t)m_selftest(&state, NULL));
  m_reset(&state);
  /* What a step writes below here is its stack. */
  volatile uint32_t *const here = (volatile uint32_t *)__builtin_frame_address(0) - 64;
  for (int k = 0; k < STACK / 4; k++) here[-k] = 0x5a5a5a5a;
  for (int t = 0; t < STEPS; t++) {
    for (int k = 0; k < M_INPUT; k++) x[k] = (float)(t % 10) / 10;
    m_step(&state, x, y);
    if (t == 0) {
      int used = STACK / 4;
      while (used > 0 && here[1 - used] == 0x5a5a5a5a) used--;
      print((uint32_t)used * 4 + 256);
    }
    for (int k = 0; k < M_OUTPUT; k++) {
      union { float number; uint32_t bits; } one = {y[k]};
      print(one.bits);
    }
  }
  call_host(EXIT, (const void *)STOPPED);
}

void boot(void) {
  *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the floating-point unit on */
  __asm__ volatile("dsb\n isb");
  run();
  for (;;) {}
}
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {stack_top, (const void *)boot};
