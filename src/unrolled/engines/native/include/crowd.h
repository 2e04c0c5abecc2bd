// Whether others keep the cores busy. Threads that meet in every step then wait for one another most of the
// time, and one alone is many times faster: calls that find it so are followed by a while without threads.
#pragma once
#include <atomic>
#include <cstdint>

class Crowd {  // all times in nanoseconds, by a clock that only goes forward
  static constexpr int64_t LONG = 500000;  // of a call, from which on the next one is watched
  static constexpr int SURE = 3;           // calls in a row that found the machine crowded
  static constexpr int REST = 4;           // doublings of what such a call took, for the time without threads
  std::atomic<bool> slow{false};
  std::atomic<int> found{0};     // in so many calls in a row
  std::atomic<int64_t> over{0};  // when threads are tried again; 0: at once

 public:
  // Whether to look how long the threads of a call are kept from a core: that too takes time.
  bool watch() const { return slow.load(std::memory_order_relaxed); }

  bool there(int64_t now) const { return now < over.load(std::memory_order_relaxed); }

  // What a call on several threads has found; robbed: how long they all were kept from a core, where watched.
  void judge(int64_t began, int64_t end, bool watched, int64_t robbed) {
    const int64_t took = end - began;
    slow.store(took > LONG, std::memory_order_relaxed);
    const bool crowded = watched && robbed > took * 2 / 5;
    const int many = crowded ? found.load(std::memory_order_relaxed) + 1 : 0;
    found.store(many, std::memory_order_relaxed);
    over.store(many < SURE ? 0 : end + (took << (many < REST ? many : REST)), std::memory_order_relaxed);
  }
};
