// The arguments of a kernel call, how its work is split among threads, and the memory that they use.
#pragma once
#include <algorithm>

#include "functions.h"
#include "products.h"

// Indices into the numbers of a call. The widths, offsets and strides that the generated source reads begin at SIZES.
enum {
  STEPS,          // number of time steps
  ROWS,           // batch size, or of the first step if the sequences have different lengths
  REVERSE,        // 1: from the last time step to the first
  THREADS,        // maximum number of threads
  PACK_PER_STEP,  // 1: pack weights a block at a time in every step, not once before the loop
  BY_ROWS,        // 1: threads split the rows of the batch, not the columns
  PACKED,         // 1: the matrices were packed by an earlier call
  BLOCK_STEPS,    // number of steps in a block, for which products of the input are computed at once
  TURNS,          // 1: threads take turns at whole blocks of steps
  SIZES
};

struct Call {
  const int64_t* D;  // the numbers of the call, see above
  void* const* P;    // the pointers of the call
  const Products* products;
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
  bool pack_per_step, by_rows, turns;

  bool all_panels() const { return by_rows || turns; }

  void synchronize() const {
    if (!all_panels()) barrier->wait(count);
  }

  // The same thread's part of all rows of a block of steps.
  ThreadRange of_block(const int64_t* D) const {
    ThreadRange block = *this;
    if (!by_rows) block.batch = block.to = D[BLOCK_STEPS] * D[ROWS];
    return block;
  }
};

static inline ThreadRange thread_range(Call& c, int id, int count) {
  const int64_t rows = c.D[ROWS];
  const bool by_rows = c.D[BY_ROWS] && count > 1;
  return {c.products, &c.barrier, id, count, rows, by_rows ? rows * id / count : 0,
          by_rows ? rows * (id + 1) / count : rows, c.D[PACK_PER_STEP] != 0, by_rows, c.D[TURNS] && count > 1};
}

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
