// Detects whether other processes keep the cores busy. Threads that synchronize in every step then spend most of
// their time waiting, and one thread alone is many times faster. After several contended calls, the next calls use
// one thread for a while.
#pragma once
#include <atomic>
#include <cstdint>

#include "tuning.h"

class ContentionMonitor {  // all times in nanoseconds, from a monotonic clock
  std::atomic<bool> slow{false};
  std::atomic<int> contended_calls{0};       // in a row
  std::atomic<int64_t> disabled_until{0};    // 0: threads are enabled

 public:
  // Whether the next call should measure how long its threads are kept from a core. Measuring takes time, too.
  bool should_measure() const { return slow.load(std::memory_order_relaxed); }

  bool is_contended(int64_t now) const { return now < disabled_until.load(std::memory_order_relaxed); }

  // Records a call on several threads. stolen: the total time that its threads were kept from a core, if measured.
  void record(int64_t start, int64_t end, bool measured, int64_t stolen) {
    const int64_t duration = end - start;
    slow.store(duration > MIN_CONTENDED_DURATION, std::memory_order_relaxed);
    const bool contended = measured && stolen > duration * STOLEN_PERCENT / 100;
    const int calls = contended ? contended_calls.load(std::memory_order_relaxed) + 1 : 0;
    contended_calls.store(calls, std::memory_order_relaxed);
    disabled_until.store(
        calls < CONFIRMATIONS ? 0 : end + (duration << (calls < MAX_DOUBLINGS ? calls : MAX_DOUBLINGS)),
        std::memory_order_relaxed);
  }
};
