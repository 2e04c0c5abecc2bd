// How the work of a loop is shared by its threads, and the memory that they keep.
#pragma once
#include <algorithm>

#include "functions.h"
#include "products.h"

// The first numbers of a call; the widths, offsets and strides that the generated source reads follow.
enum { STEPS, ROWS, BACK, THREADS, DIRECT, BY_ROWS, PACKED, HOISTED, TURNS, SIZES };

struct Call {
  const int64_t* D;
  void* const* P;
  const Products* products;
  char* room;          // what all threads share, then what each has for itself
  size_t shared, own;  // their bytes
  Meeting meeting;
  alignas(64) std::atomic<long> blocks{0};  // that are over, where threads take turns
};

// What one thread does of a step: some rows, or some of the panels of each phase. Or threads take turns: one does
// some steps whole, while the others make ready what is known before the steps that follow.
struct Share {
  const Products* products;
  Meeting* meeting;
  int id, count;
  long few, from, to;  // the rows of a step; its own
  bool direct, by_rows, turns;

  bool all_panels() const { return by_rows || turns; }

  void meet() const {
    if (!all_panels()) meeting->wait(count);
  }

  // The same of all rows that are hoisted together.
  Share of_block(const int64_t* D) const {
    Share all = *this;
    if (!by_rows) all.few = all.to = D[HOISTED] * D[ROWS];
    return all;
  }
};

static inline Share share(Call& c, int id, int count) {
  const long rows = c.D[ROWS];
  const bool by_rows = c.D[BY_ROWS] && count > 1;
  return {c.products, &c.meeting, id, count, rows, by_rows ? rows * id / count : 0,
          by_rows ? rows * (id + 1) / count : rows, c.D[DIRECT] != 0, by_rows, c.D[TURNS] && count > 1};
}

// Hands out the memory of a call, or without a beginning counts how much it takes.
struct Room {
  char* begin;
  size_t used = 0;

  template <class E> E* take(size_t elements) {
    E* found = begin ? (E*)(begin + used) : nullptr;
    used += (elements * sizeof(E) + 63) / 64 * 64;  // no two threads write to one line
    return found;
  }
};
