// The team of threads: work is shared by as many as are free, at least the caller.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstddef>

// Calls work(what, id, count) on the caller (id 0) and on up to wanted - 1 others, and waits for all. Before,
// prepare(what, count) is called once, where there is one; if it fails, no work is done. Whether it was.
using TeamRun = bool (*)(int wanted, bool (*prepare)(void* what, int count),
                         void (*work)(void* what, int id, int count), void* what);

// Memory of the calling thread, aligned to 64 bytes, until its next call; null where there is none.
using TeamRoom = char* (*)(size_t bytes);

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait for something that another thread is about to do.
template <class Done> static inline void spin(Done done) {
  for (long spins = 0; !done(); spins++) {
    if (spins < 4000) relax();
    else sched_yield();
  }
}

// A place where all threads of a piece of work meet.
struct Meeting {
  alignas(64) std::atomic<int> here{0};
  alignas(64) std::atomic<int> round{0};

  void wait(int count) {
    if (count == 1) return;
    const int now = round.load(std::memory_order_relaxed);
    if (here.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      here.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    spin([&] { return round.load(std::memory_order_acquire) != now; });
  }
};
