// The thread pool. If torch's OpenMP runtime was found, its workers are used: after a torch operation they keep
// spinning for some milliseconds, and threads of our own would have to share the cores with them. Otherwise, and in a
// forked child, where that runtime can't be used, the pool starts its own threads once.
#include "contention_monitor.h"
#include "thread_pool.h"

#include <pthread.h>
#include <time.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr int IDLE_SPINS = 20000;                    // of an idle worker before it sleeps: 100 to 300 microseconds
constexpr int START_SPINS = 4000;                    // of a caller that waits for its workers to start
constexpr int MAX_WORKERS = 4096;
constexpr size_t MAX_CACHED = size_t(32) << 20;      // bytes of scratch memory that a thread keeps between calls

int64_t now(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

struct Task {
  bool (*prepare)(void*, int);
  void (*run)(void*, int, int);
  void* argument;
  std::atomic<int> count{0};  // number of threads, once the task is prepared; -1: preparing failed
  std::atomic<int> joined{1}, running{0};
  bool measured = false;
  std::atomic<int64_t> stolen{0};  // nanoseconds that the threads were kept from a core, if measured

  void run_first(int threads) {
    const bool ready = !prepare || prepare(argument, threads);
    count.store(ready ? threads : -1, std::memory_order_release);
    if (ready) run_part(0, threads);
  }

  void run_other(int id) {
    int threads;
    spin_until([&] { return (threads = count.load(std::memory_order_acquire)) != 0; });
    if (threads > 0) run_part(id, threads);
  }

  void run_part(int id, int threads) {
    if (!measured) return run(argument, id, threads);
    const int64_t start = now(CLOCK_MONOTONIC), cpu_start = now(CLOCK_THREAD_CPUTIME_ID);
    run(argument, id, threads);
    stolen += now(CLOCK_MONOTONIC) - start - (now(CLOCK_THREAD_CPUTIME_ID) - cpu_start);
  }
};

ContentionMonitor monitor;

// --- OpenMP's workers, through GCC's entry points, which LLVM's runtime has as well ---

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetNumber = int (*)();
Parallel parallel = nullptr;
GetNumber get_thread_num = nullptr, get_num_threads = nullptr;

void run_openmp_part(void* argument) {
  Task& task = *(Task*)argument;
  const int id = get_thread_num();
  if (id == 0) task.run_first(get_num_threads());
  else task.run_other(id);
}

// --- our own workers ---

// Constructs an object without operator new. Only headers of the C++ library are used: some compilers would have to
// build the library before they could link to it.
template <class E> E* construct() {
  void* memory = std::aligned_alloc(alignof(E), (sizeof(E) + alignof(E) - 1) / alignof(E) * alignof(E));
  return memory ? new (memory) E : nullptr;
}

struct Worker {
  alignas(64) std::atomic<Task*> assigned{nullptr};
  std::atomic<bool> asleep{false};
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

  void work() {
    for (;;) {
      Task* task = nullptr;
      for (int k = 0; k < IDLE_SPINS && !assigned.load(std::memory_order_relaxed); k++) relax();
      if (!assigned.load()) {
        pthread_mutex_lock(&mutex);
        asleep.store(true);
        while (!assigned.load()) pthread_cond_wait(&wake, &mutex);
        asleep.store(false);
        pthread_mutex_unlock(&mutex);
      }
      if (!(task = take())) continue;
      task->run_other(task->joined.fetch_add(1));
      task->running.fetch_sub(1, std::memory_order_release);
    }
  }

  // An assigned task is taken either by the worker or, if the worker doesn't come in time, back by the caller.
  Task* take() { return assigned.exchange(nullptr); }

  void assign(Task* task) {
    assigned.store(task);
    if (asleep.load()) {
      pthread_mutex_lock(&mutex);
      pthread_cond_signal(&wake);
      pthread_mutex_unlock(&mutex);
    }
  }
};

struct ThreadPool {
  pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
  Worker* workers[MAX_WORKERS];
  int count = 0;

  // Starts workers until there are as many as needed, or the system refuses. Returns how many can be used.
  int grow(int needed) {
    if (needed > MAX_WORKERS) needed = MAX_WORKERS;
    while (count < needed) {
      Worker* worker = construct<Worker>();
      const auto work = [](void* worker) -> void* {
        ((Worker*)worker)->work();
        return nullptr;
      };
      pthread_t thread;
      if (!worker || pthread_create(&thread, nullptr, work, worker)) {
        std::free(worker);
        break;
      }
      pthread_detach(thread);
      workers[count++] = worker;
    }
    return count < needed ? count : needed;
  }

  // Assigns a task to workers and returns how many started it. Workers that don't start in time, because the cores
  // are busy, are left out.
  int assign(Task& task, int needed) {
    const int assigned = grow(needed);
    task.running.store(assigned);
    for (int k = 0; k < assigned; k++) workers[k]->assign(&task);
    int spins = START_SPINS, started = 0;
    for (int k = 0; k < assigned; k++) {
      while (workers[k]->assigned.load() && spins-- > 0) relax();
      if (workers[k]->take()) task.running.fetch_sub(1);
      else started++;
    }
    return started;
  }
};

// Never deleted, since its threads live as long as the process. A forked child starts with a pool of its own.
ThreadPool* pool = construct<ThreadPool>();

void after_fork_in_child() {
  pool = construct<ThreadPool>();
  parallel = nullptr;
}

#ifdef __GLIBC__  // glibc's pthread_atfork, which is in no shared library, calls this function
extern "C" int __register_atfork(void (*)(), void (*)(), void (*)(), void*);
const int registered = __register_atfork(nullptr, nullptr, after_fork_in_child, nullptr);
#else
const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif

struct ThreadBuffer {
  char* memory = nullptr;
  size_t size = 0;

  char* reserve(size_t bytes) {
    if (bytes > size || (size > MAX_CACHED && bytes <= MAX_CACHED)) {
      std::free(memory);
      size = (bytes + 4095) / 4096 * 4096;
      if (!(memory = (char*)std::aligned_alloc(64, size))) size = 0;
    }
    return memory;
  }
};

pthread_key_t buffer_key;  // frees the buffer when its thread ends
const int key_error = pthread_key_create(&buffer_key, [](void* buffer) {
  std::free(((ThreadBuffer*)buffer)->memory);
  std::free(buffer);
});

}  // namespace

extern "C" void thread_pool_use_openmp(void* gomp_parallel, void* thread_num, void* num_threads) {
  parallel = (Parallel)gomp_parallel, get_thread_num = (GetNumber)thread_num, get_num_threads = (GetNumber)num_threads;
}

extern "C" char* thread_pool_scratch(size_t bytes) {
  static thread_local ThreadBuffer* buffer = nullptr;
  if (!buffer && (key_error || !(buffer = construct<ThreadBuffer>()) || pthread_setspecific(buffer_key, buffer))) {
    std::free(buffer);
    buffer = nullptr;
    return nullptr;
  }
  return buffer->reserve(bytes ? bytes : 1);
}

extern "C" bool thread_pool_run(int max_threads, bool (*prepare)(void*, int), void (*run)(void*, int, int),
                                void* argument) {
  Task task{prepare, run, argument};
  ThreadPool* own = pool;
  if (max_threads <= 1 || !own || monitor.is_contended(now(CLOCK_MONOTONIC)) || pthread_mutex_trylock(&own->busy)) {
    task.run_first(1);
  } else {
    task.measured = monitor.should_measure();
    const int64_t start = now(CLOCK_MONOTONIC);
    if (parallel) {
      parallel(run_openmp_part, &task, (unsigned)max_threads, 0);
    } else {
      const int started = own->assign(task, max_threads - 1);
      task.run_first(started + 1);
      spin_until([&] { return task.running.load(std::memory_order_acquire) <= 0; });
    }
    monitor.record(start, now(CLOCK_MONOTONIC), task.measured, task.stolen.load());
    pthread_mutex_unlock(&own->busy);
  }
  return task.count.load(std::memory_order_relaxed) > 0;
}

// Runs two kernels at the same time, each on one thread. calls: for each kernel its function and three arguments.
extern "C" bool thread_pool_run_pair(void** calls) {
  using Run = bool (*)(void*, void*, void*);
  struct Pair {
    void** calls;
    std::atomic<bool> succeeded{true};
  } pair{calls};
  const auto run = [](void* argument, int id, int count) {
    Pair& p = *(Pair*)argument;
    for (int k = id; k < 2; k += count)
      if (!((Run)p.calls[4 * k])(p.calls[4 * k + 1], p.calls[4 * k + 2], p.calls[4 * k + 3])) p.succeeded = false;
  };
  thread_pool_run(2, nullptr, run, &pair);
  return pair.succeeded;
}
