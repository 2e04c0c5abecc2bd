// A kernel call, how its work is split among threads, and the memory that they use.
#pragma once
#include <algorithm>

#include "call.h"
#include "functions.h"
#include "products.h"

struct Call : CallArguments {
  void* const* pointers;  // values, states and memory for results, in the order of the sizes
  char* memory;        // first what all threads share, then what each thread has for itself
  size_t shared, own;  // the bytes of both
  SpinBarrier barrier;
  alignas(64) std::atomic<int64_t> finished_blocks{0};  // if threads take turns
};

// One thread's part of a step: some rows, or some of the panels of each phase. If threads take turns, one thread runs
// the steps of a block whole, while the others compute the input products of the following blocks.
struct ThreadRange {
  const Products* products;
  SpinBarrier* barrier;
  int id, count;
  int64_t batch, from, to;  // the rows of a step, and those of this thread
  bool pack_per_step;
  Strategy strategy;

  bool by_rows() const { return strategy == SHARE_ROWS; }
  bool all_panels() const { return strategy != SHARE_COLUMNS; }

  void synchronize() const {
    if (!all_panels()) barrier->wait(count);
  }

  // The same thread's part of all rows of a block of steps.
  ThreadRange of_block(const Call& c) const {
    ThreadRange block = *this;
    if (!by_rows()) block.batch = block.to = c.block_steps * c.rows;
    return block;
  }
};

static inline ThreadRange thread_range(Call& c, int id, int count) {
  const int64_t rows = c.rows;
  const Strategy strategy = count > 1 ? (Strategy)c.strategy : SHARE_COLUMNS;
  const bool by_rows = strategy == SHARE_ROWS;
  return {c.products, &c.barrier, id, count, rows, by_rows ? rows * id / count : 0,
          by_rows ? rows * (id + 1) / count : rows, c.pack_per_step != 0, strategy};
}

// Reads the sizes and the pointers of a kernel, in the order in which codegen.py lists them.
struct ArgumentReader {
  const int64_t* sizes;
  void* const* pointers;

  int64_t size() { return *sizes++; }
  T* pointer() { return (T*)*pointers++; }
};

// Hands out the memory of a call. If begin is null, it only counts the bytes that are needed.
struct Arena {
  char* begin;
  size_t used = 0;

  template <class E> E* take(size_t elements) {
    E* memory = begin ? (E*)(begin + used) : nullptr;
    used += (elements * sizeof(E) + 63) / 64 * 64;  // so that no two threads write to the same cache line
    return memory;
  }
};
