// A team of threads, started once: each spins briefly for work, then sleeps. torch's pool is not touched.
#include "team.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS = 20000;  // some 50 to 100 microseconds

struct Work {
  void (*run)(void*, int, int);
  void* what;
  int count;
  std::atomic<int> left;
};

struct Worker {
  alignas(64) std::atomic<Work*> given{nullptr};
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable called;
  int id;

  void live() {
    for (;;) {
      Work* work = nullptr;
      for (int k = 0; k < SPINS && !(work = given.load(std::memory_order_acquire)); k++) relax();
      if (!work) {
        std::unique_lock<std::mutex> lock(mutex);
        asleep.store(true);
        called.wait(lock, [&] { return (work = given.load()) != nullptr; });
        asleep.store(false);
      }
      given.store(nullptr, std::memory_order_relaxed);
      work->run(work->what, id, work->count);
      work->left.fetch_sub(1, std::memory_order_release);
    }
  }

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
      worker->id = (int)workers.size() + 1;
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
};

// Never deleted: its threads live as long as the process. A forked child starts with a team of its own.
Team* team = new Team;
const int forks = pthread_atfork(nullptr, nullptr, [] { team = new Team; });

}  // namespace

extern "C" void team_run(int wanted, void (*run)(void*, int, int), void* what) {
  Team* mine = team;
  std::unique_lock<std::mutex> lock(mine->busy, std::try_to_lock);
  const int helpers = wanted > 1 && lock.owns_lock() ? mine->grow(wanted - 1) : 0;
  Work work{run, what, helpers + 1, {helpers}};
  for (int k = 0; k < helpers; k++) mine->workers[k]->give(&work);
  run(what, 0, helpers + 1);
  for (long spins = 0; work.left.load(std::memory_order_acquire) > 0; spins++) {
    if (spins < 4000) relax();
    else sched_yield();
  }
}
