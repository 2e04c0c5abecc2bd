// What depends on the compiler and the operating system, for all sources.
#pragma once

#if defined(__clang__)
#if __clang_major__ < 13
#error "unrolled needs clang 13 or newer"
#endif
#elif defined(__GNUC__) && __GNUC__ < 12
#error "unrolled needs g++ 12 or newer"
#endif

// EXPORT marks the functions that Python looks up in a library.
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
extern "C" __declspec(dllimport) int __stdcall SwitchToThread(void);
#else
#include <sched.h>
#define EXPORT extern "C"
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
// For the passes over a phase: inlined into the loop over time, their arithmetic would spill registers.
#define NEVER_INLINE __attribute__((noinline))

// Tells the processor that this thread waits in a loop.
static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Lets another thread run.
static inline void yield_core() {
#if defined(_WIN32)
  SwitchToThread();
#else
  sched_yield();
#endif
}
