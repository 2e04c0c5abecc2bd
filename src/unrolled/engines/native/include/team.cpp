// The team of threads. Where torch's OpenMP runtime is known, its workers do the work: after an operation of
// torch they go on spinning for some milliseconds, and other threads would have to share the cores with them.
// Else, and in a forked child, where that runtime can't be used, it is a team of our own, started once.
#include "crowd.h"
#include "team.h"

#include <pthread.h>
#include <time.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr int SPINS = 20000;              // of an idle worker, some 100 to 300 microseconds
constexpr int PATIENCE = 4000;            // of a caller, for a worker to come
constexpr int MOST = 4096;                // workers
constexpr size_t KEPT = size_t(32) << 20; // bytes that a thread keeps between calls, at most

int64_t now(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

struct Work {
  bool (*prepare)(void*, int);
  void (*run)(void*, int, int);
  void* what;
  std::atomic<int> count{0};  // of threads, once all is prepared; -1: it failed
  std::atomic<int> joined{1}, left{0};
  bool watched = false;
  std::atomic<int64_t> robbed{0};  // nanoseconds that threads were kept from a core, where that is watched

  void lead(int threads) {
    const bool ready = !prepare || prepare(what, threads);
    count.store(ready ? threads : -1, std::memory_order_release);
    if (ready) share(0, threads);
  }

  void follow(int id) {
    int threads;
    spin([&] { return (threads = count.load(std::memory_order_acquire)) != 0; });
    if (threads > 0) share(id, threads);
  }

  void share(int id, int threads) {
    if (!watched) return run(what, id, threads);
    const int64_t began = now(CLOCK_MONOTONIC), computed = now(CLOCK_THREAD_CPUTIME_ID);
    run(what, id, threads);
    robbed += now(CLOCK_MONOTONIC) - began - (now(CLOCK_THREAD_CPUTIME_ID) - computed);
  }
};

Crowd crowd;

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

// Of C++ the headers alone are used: a compiler may have to build its library before it can link to it.
template <class E> E* made() {
  void* place = std::aligned_alloc(alignof(E), (sizeof(E) + alignof(E) - 1) / alignof(E) * alignof(E));
  return place ? new (place) E : nullptr;
}

struct Worker {
  alignas(64) std::atomic<Work*> given{nullptr};
  std::atomic<bool> asleep{false};
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t called = PTHREAD_COND_INITIALIZER;

  void live() {
    for (;;) {
      Work* work = nullptr;
      for (int k = 0; k < SPINS && !given.load(std::memory_order_relaxed); k++) relax();
      if (!given.load()) {
        pthread_mutex_lock(&mutex);
        asleep.store(true);
        while (!given.load()) pthread_cond_wait(&called, &mutex);
        asleep.store(false);
        pthread_mutex_unlock(&mutex);
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
      pthread_mutex_lock(&mutex);
      pthread_cond_signal(&called);
      pthread_mutex_unlock(&mutex);
    }
  }
};

struct Team {
  pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
  Worker* workers[MOST];
  int count = 0;

  // As many workers as are wanted, or as the system gives.
  int grow(int wanted) {
    if (wanted > MOST) wanted = MOST;
    while (count < wanted) {
      Worker* worker = made<Worker>();
      const auto live = [](void* worker) -> void* {
        ((Worker*)worker)->live();
        return nullptr;
      };
      pthread_t thread;
      if (!worker || pthread_create(&thread, nullptr, live, worker)) {
        std::free(worker);
        break;
      }
      pthread_detach(thread);
      workers[count++] = worker;
    }
    return count < wanted ? count : wanted;
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
Team* team = made<Team>();

void forked() {
  team = made<Team>();
  parallel = nullptr;
}

#ifdef __GLIBC__  // what its pthread_atfork, which no shared library holds, calls
extern "C" int __register_atfork(void (*)(), void (*)(), void (*)(), void*);
const int forks = __register_atfork(nullptr, nullptr, forked, nullptr);
#else
const int forks = pthread_atfork(nullptr, nullptr, forked);
#endif

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
};

pthread_key_t rooms;  // each thread's own
const int no_rooms = pthread_key_create(&rooms, [](void* room) {
  std::free(((Room*)room)->kept);
  std::free(room);
});

}  // namespace

extern "C" void team_join(void* start, void* number, void* count) {
  parallel = (Parallel)start, own_number = (Number)number, how_many = (Number)count;
}

extern "C" char* team_room(size_t bytes) {
  static thread_local Room* room = nullptr;
  if (!room && (no_rooms || !(room = made<Room>()) || pthread_setspecific(rooms, room))) {
    std::free(room);
    room = nullptr;
    return nullptr;
  }
  return room->grow(bytes ? bytes : 1);
}

extern "C" bool team_run(int wanted, bool (*prepare)(void*, int), void (*run)(void*, int, int), void* what) {
  Work work{prepare, run, what};
  Team* mine = team;
  if (wanted <= 1 || !mine || crowd.there(now(CLOCK_MONOTONIC)) || pthread_mutex_trylock(&mine->busy)) {
    work.lead(1);
  } else {
    work.watched = crowd.watch();
    const int64_t began = now(CLOCK_MONOTONIC);
    if (parallel) {
      parallel(part, &work, (unsigned)wanted, 0);
    } else {
      const int came = mine->gather(work, wanted - 1);
      work.lead(came + 1);
      spin([&] { return work.left.load(std::memory_order_acquire) <= 0; });
    }
    crowd.judge(began, now(CLOCK_MONOTONIC), work.watched, work.robbed.load());
    pthread_mutex_unlock(&mine->busy);
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
