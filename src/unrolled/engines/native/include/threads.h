// Threads, locks, clocks and aligned memory of the operating system: POSIX or Windows.
//
// The classes of the C++ library aren't used: some compilers would have to build it before they could link to it.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "platform.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <malloc.h>
#include <windows.h>

struct Mutex {
  SRWLOCK lock = SRWLOCK_INIT;

  void acquire() { AcquireSRWLockExclusive(&lock); }
  bool try_acquire() { return TryAcquireSRWLockExclusive(&lock); }
  void release() { ReleaseSRWLockExclusive(&lock); }
};

struct Condition {
  CONDITION_VARIABLE condition = CONDITION_VARIABLE_INIT;

  void wait(Mutex& held) { SleepConditionVariableSRW(&condition, &held.lock, INFINITE, 0); }
  void notify() { WakeConditionVariable(&condition); }
};

// A pointer that each thread has for itself. `release` is called with it when its thread ends.
struct ThreadPointer {
  DWORD key;

  explicit ThreadPointer(void(WINAPI* release)(void*)) : key(FlsAlloc(release)) {}
  bool usable() const { return key != FLS_OUT_OF_INDEXES; }
  void* get() const { return FlsGetValue(key); }
  bool set(void* value) const { return FlsSetValue(key, value); }
};
#define THREAD_CALLBACK WINAPI

// Starts a thread that lives as long as the process; returns whether it could be started.
template <class Argument, void (*RUN)(Argument*)> bool start_thread(Argument* argument) {
  const auto run = [](void* value) -> DWORD {
    RUN((Argument*)value);
    return 0;
  };
  const HANDLE thread = CreateThread(nullptr, 0, run, argument, 0, nullptr);
  return thread && CloseHandle(thread);
}

static const int64_t ticks_per_second = [] {
  LARGE_INTEGER value;
  QueryPerformanceFrequency(&value);
  return (int64_t)value.QuadPart;
}();

// Returns the time in nanoseconds.
static inline int64_t now() {
  LARGE_INTEGER value;
  QueryPerformanceCounter(&value);
  const int64_t seconds = value.QuadPart / ticks_per_second, ticks = value.QuadPart % ticks_per_second;
  return seconds * 1000000000 + ticks * 1000000000 / ticks_per_second;
}

// Returns the time that this thread has had a core. Windows updates that time only every 16 ms, which is too coarse:
// as far as the caller can tell, the thread always has a core.
static inline int64_t thread_time() { return now(); }

static inline void* aligned_memory(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }
static inline void free_aligned(void* memory) { _aligned_free(memory); }

static inline void after_fork(void (*)()) {}

#else
#include <pthread.h>
#include <time.h>

struct Mutex {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

  void acquire() { pthread_mutex_lock(&mutex); }
  bool try_acquire() { return pthread_mutex_trylock(&mutex) == 0; }
  void release() { pthread_mutex_unlock(&mutex); }
};

struct Condition {
  pthread_cond_t condition = PTHREAD_COND_INITIALIZER;

  void wait(Mutex& held) { pthread_cond_wait(&condition, &held.mutex); }
  void notify() { pthread_cond_signal(&condition); }
};

struct ThreadPointer {
  pthread_key_t key;
  int error;

  explicit ThreadPointer(void (*release)(void*)) : error(pthread_key_create(&key, release)) {}
  bool usable() const { return error == 0; }
  void* get() const { return pthread_getspecific(key); }
  bool set(void* value) const { return pthread_setspecific(key, value) == 0; }
};
#define THREAD_CALLBACK

template <class Argument, void (*RUN)(Argument*)> bool start_thread(Argument* argument) {
  const auto run = [](void* value) -> void* {
    RUN((Argument*)value);
    return nullptr;
  };
  pthread_t thread;
  return pthread_create(&thread, nullptr, run, argument) == 0 && pthread_detach(thread) == 0;
}

static inline int64_t time_of(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}
static inline int64_t now() { return time_of(CLOCK_MONOTONIC); }
static inline int64_t thread_time() { return time_of(CLOCK_THREAD_CPUTIME_ID); }

static inline void* aligned_memory(size_t alignment, size_t bytes) { return std::aligned_alloc(alignment, bytes); }
static inline void free_aligned(void* memory) { std::free(memory); }

#ifdef __GLIBC__  // glibc's pthread_atfork, which is in no shared library, calls this function
extern "C" int __register_atfork(void (*)(), void (*)(), void (*)(), void*);
static inline void after_fork(void (*in_child)()) { __register_atfork(nullptr, nullptr, in_child, nullptr); }
#else
static inline void after_fork(void (*in_child)()) { pthread_atfork(nullptr, nullptr, in_child); }
#endif
#endif
