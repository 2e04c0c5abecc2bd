// The thread pool. If torch's OpenMP runtime was found, its workers are used: after a torch operation they keep
// spinning for some milliseconds, and threads of our own would have to share the cores with them. Otherwise, and in a
// forked child, where that runtime can't be used, the pool starts its own threads once.
#include "contention_monitor.h"
#include "thread_pool.h"

#include "threads.h"

#include <new>

namespace {

constexpr int MAX_WORKERS = 4096;

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
    const int64_t start = now(), core_start = thread_time();
    run(argument, id, threads);
    stolen += now() - start - (thread_time() - core_start);
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

// Constructs an object without operator new, which is in the C++ library (see threads.h).
template <class E> E* construct() {
  void* memory = aligned_memory(alignof(E), (sizeof(E) + alignof(E) - 1) / alignof(E) * alignof(E));
  return memory ? new (memory) E : nullptr;
}

struct Worker {
  alignas(64) std::atomic<Task*> assigned{nullptr};
  std::atomic<bool> asleep{false};
  Mutex mutex;
  Condition wake;

  void work() {
    for (;;) {
      Task* task = nullptr;
      for (int k = 0; k < IDLE_SPINS && !assigned.load(std::memory_order_relaxed); k++) relax();
      if (!assigned.load()) {
        mutex.acquire();
        asleep.store(true);
        while (!assigned.load()) wake.wait(mutex);
        asleep.store(false);
        mutex.release();
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
      mutex.acquire();
      wake.notify();
      mutex.release();
    }
  }
};

void work(Worker* worker) { worker->work(); }

struct ThreadPool {
  Mutex busy;
  Worker* workers[MAX_WORKERS];
  int count = 0;

  // Starts workers until there are as many as needed, or the system refuses. Returns how many can be used.
  int grow(int needed) {
    if (needed > MAX_WORKERS) needed = MAX_WORKERS;
    while (count < needed) {
      Worker* worker = construct<Worker>();
      if (!worker || !start_thread<Worker, work>(worker)) {
        free_aligned(worker);
        break;
      }
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

[[maybe_unused]] const bool registered = (after_fork(after_fork_in_child), true);

struct ThreadBuffer {
  char* memory = nullptr;
  size_t size = 0;

  char* reserve(size_t bytes) {
    if (bytes > size || (size > MAX_CACHED && bytes <= MAX_CACHED)) {
      free_aligned(memory);
      size = (bytes + 4095) / 4096 * 4096;
      if (!(memory = (char*)aligned_memory(64, size))) size = 0;
    }
    return memory;
  }
};

void THREAD_CALLBACK free_buffer(void* buffer) {
  if (!buffer) return;
  free_aligned(((ThreadBuffer*)buffer)->memory);
  free_aligned(buffer);
}

const ThreadPointer thread_buffer(free_buffer);

}  // namespace

EXPORT void thread_pool_use_openmp(void* gomp_parallel, void* thread_num, void* num_threads) {
  parallel = (Parallel)gomp_parallel, get_thread_num = (GetNumber)thread_num, get_num_threads = (GetNumber)num_threads;
}

EXPORT char* thread_pool_scratch(size_t bytes) {
  if (!thread_buffer.usable()) return nullptr;
  ThreadBuffer* buffer = (ThreadBuffer*)thread_buffer.get();
  if (!buffer && (!(buffer = construct<ThreadBuffer>()) || !thread_buffer.set(buffer))) {
    free_aligned(buffer);
    return nullptr;
  }
  return buffer->reserve(bytes ? bytes : 1);
}

EXPORT bool thread_pool_run(int max_threads, bool (*prepare)(void*, int), void (*run)(void*, int, int),
                                void* argument) {
  Task task{prepare, run, argument};
  ThreadPool* own = pool;
  if (max_threads <= 1 || !own || monitor.is_contended(now()) || !own->busy.try_acquire()) {
    task.run_first(1);
  } else {
    task.measured = monitor.should_measure();
    const int64_t start = now();
    if (parallel) {
      parallel(run_openmp_part, &task, (unsigned)max_threads, 0);
    } else {
      const int started = own->assign(task, max_threads - 1);
      task.run_first(started + 1);
      spin_until([&] { return task.running.load(std::memory_order_acquire) <= 0; });
    }
    monitor.record(start, now(), task.measured, task.stolen.load());
    own->busy.release();
  }
  return task.count.load(std::memory_order_relaxed) > 0;
}

// Runs two kernels at the same time, each on one thread. calls: for each kernel its function and two arguments.
EXPORT bool thread_pool_run_pair(void** calls) {
  using Run = bool (*)(void*, void*);
  struct Pair {
    void** calls;
    std::atomic<bool> succeeded{true};
  } pair{calls};
  const auto run = [](void* argument, int id, int count) {
    Pair& p = *(Pair*)argument;
    for (int k = id; k < 2; k += count)
      if (!((Run)p.calls[3 * k])(p.calls[3 * k + 1], p.calls[3 * k + 2])) p.succeeded = false;
  };
  thread_pool_run(2, nullptr, run, &pair);
  return pair.succeeded;
}
