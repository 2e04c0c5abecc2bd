// Interface of the thread pool (thread_pool.cpp), and how the threads of a call wait for one another.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "platform.h"
#include "tuning.h"

// Calls run(argument, id, count) on the caller (id 0) and on up to max_threads - 1 other threads, and waits for all of
// them. If prepare isn't null, prepare(argument, count) is called once before; if it fails, nothing is run. Returns
// whether the task was run.
using RunParallel = bool (*)(int max_threads, bool (*prepare)(void* argument, int count),
                             void (*run)(void* argument, int id, int count), void* argument);

// Returns memory of the calling thread, aligned to 64 bytes and valid until the thread's next call; null if there is
// not enough.
using ScratchMemory = char* (*)(size_t bytes);

// Waits for something that another thread is about to do.
template <class Done> static inline void spin_until(Done done) {
  for (int64_t spins = 0; !done(); spins++) {
    if (spins < SPINS) relax();
    else yield_core();
  }
}

// A barrier for all threads of a task.
struct SpinBarrier {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> generation{0};

  void wait(int count) {
    if (count == 1) return;
    const int now = generation.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      arrived.store(0, std::memory_order_relaxed);
      generation.store(now + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return generation.load(std::memory_order_acquire) != now; });
  }
};
