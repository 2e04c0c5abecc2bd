// The team of threads. Where torch's OpenMP runtime is known, its workers do the work: after an operation of
// torch they go on spinning for some milliseconds, and other threads would have to share the cores with them.
// Else, and in a forked child, where that runtime can't be used, it is a team of our own, started once.
#include "team.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS = 20000;              // of an idle worker, some 100 to 300 microseconds
constexpr int PATIENCE = 4000;            // of a caller, for a worker to come
constexpr size_t KEPT = size_t(32) << 20; // bytes that a thread keeps between calls, at most

struct Work {
  bool (*prepare)(void*, int);
  void (*run)(void*, int, int);
  void* what;
  std::atomic<int> count{0};  // of threads, once all is prepared; -1: it failed
  std::atomic<int> joined{1}, left{0};

  void lead(int threads) {
    const bool ready = !prepare || prepare(what, threads);
    count.store(ready ? threads : -1, std::memory_order_release);
    if (ready) run(what, 0, threads);
  }

  void follow(int id) {
    int threads;
    spin([&] { return (threads = count.load(std::memory_order_acquire)) != 0; });
    if (threads > 0) run(what, id, threads);
  }
};

// --- the workers of OpenMP: GCC's entry points, that LLVM's runtime has too ---

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();
Parallel parallel = nullptr;
Number own_number = nullptr, how_many = nullptr;

void part(void* given) {
  Work& work = *(Work*)given;
  const int id = own_number();
  if (id == 0) work.lead(how_many());
  else work.follow(id);
}

// --- a team of our own ---

struct Worker {
  alignas(64) std::atomic<Work*> given{nullptr};
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable called;

  void live() {
    for (;;) {
      Work* work = nullptr;
      for (int k = 0; k < SPINS && !given.load(std::memory_order_relaxed); k++) relax();
      if (!given.load()) {
        std::unique_lock<std::mutex> lock(mutex);
        asleep.store(true);
        called.wait(lock, [&] { return given.load() != nullptr; });
        asleep.store(false);
      }
      if (!(work = take())) continue;
      work->follow(work->joined.fetch_add(1));
      work->left.fetch_sub(1, std::memory_order_release);
    }
  }

  // What is given is taken by the worker, or back by the caller.
  Work* take() { return given.exchange(nullptr); }

  void give(Work* work) {
    given.store(work);
    if (asleep.load()) {
      std::lock_guard<std::mutex> lock(mutex);
      called.notify_one();
    }
  }
};

struct Team {
  std::mutex busy;
  std::vector<Worker*> workers;

  // As many workers as are wanted, or as the system gives.
  int grow(int wanted) {
    while ((int)workers.size() < wanted) {
      Worker* worker = new Worker;
      try {
        std::thread([worker] { worker->live(); }).detach();
      } catch (const std::system_error&) {
        delete worker;
        break;
      }
      workers.push_back(worker);
    }
    return (int)workers.size() < wanted ? (int)workers.size() : wanted;
  }

  // Workers that don't come in time, since others keep the cores busy, are left out.
  int gather(Work& work, int wanted) {
    const int asked = grow(wanted);
    work.left.store(asked);
    for (int k = 0; k < asked; k++) workers[k]->give(&work);
    int patience = PATIENCE, came = 0;
    for (int k = 0; k < asked; k++) {
      while (workers[k]->given.load() && patience-- > 0) relax();
      if (workers[k]->take()) work.left.fetch_sub(1);
      else came++;
    }
    return came;
  }
};

// Never deleted: its threads live as long as the process. A forked child starts with a team of its own.
Team* team = new Team;
const int forks = pthread_atfork(nullptr, nullptr, [] {
  team = new Team;
  parallel = nullptr;
});

struct Room {
  char* kept = nullptr;
  size_t size = 0;

  char* grow(size_t bytes) {
    if (bytes > size || (size > KEPT && bytes <= KEPT)) {
      std::free(kept);
      size = (bytes + 4095) / 4096 * 4096;
      if (!(kept = (char*)std::aligned_alloc(64, size))) size = 0;
    }
    return kept;
  }

  ~Room() { std::free(kept); }
};

}  // namespace

extern "C" void team_join(void* start, void* number, void* count) {
  parallel = (Parallel)start, own_number = (Number)number, how_many = (Number)count;
}

extern "C" char* team_room(size_t bytes) {
  static thread_local Room room;
  return room.grow(bytes ? bytes : 1);
}

extern "C" bool team_run(int wanted, bool (*prepare)(void*, int), void (*run)(void*, int, int), void* what) {
  Work work{prepare, run, what};
  Team* mine = team;
  std::unique_lock<std::mutex> lock(mine->busy, std::defer_lock);
  if (wanted <= 1 || !lock.try_lock()) {
    work.lead(1);
  } else if (parallel) {
    parallel(part, &work, (unsigned)wanted, 0);
  } else {
    const int came = mine->gather(work, wanted - 1);
    work.lead(came + 1);
    spin([&] { return work.left.load(std::memory_order_acquire) <= 0; });
  }
  return work.count.load(std::memory_order_relaxed) > 0;
}

// Two loops at the same time, each on one thread: what to call, and its three arguments.
extern "C" bool team_both(void** calls) {
  using Run = bool (*)(void*, void*, void*);
  struct Both {
    void** calls;
    std::atomic<bool> done{true};
  } both{calls};
  const auto one = [](void* what, int id, int count) {
    Both& b = *(Both*)what;
    for (int k = id; k < 2; k += count)
      if (!((Run)b.calls[4 * k])(b.calls[4 * k + 1], b.calls[4 * k + 2], b.calls[4 * k + 3])) b.done = false;
  };
  team_run(2, nullptr, one, &both);
  return both.done;
}
