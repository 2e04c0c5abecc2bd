// Memory layout of states, before and after each step, and of other per-step values.
#pragma once
#include "thread_range.h"

// A step, its time, and the first row of that time and of its block of steps, among the rows of all times.
struct StepPosition {
  int64_t step, time, row, block_row;
};

// An input of a step. A state of another loop before each step is its state after each step, shifted by one.
struct Input {
  T* data;
  int64_t width;  // 0 if all rows share it
  T* initial;     // of a shifted state: its value before the first step

  void set_up(ArgumentReader& arguments) {
    width = arguments.size();
    data = arguments.pointer();
    initial = arguments.size() ? arguments.pointer() : nullptr;
  }

  T* at(const Call& c, const StepPosition& position) const {
    if (!initial) return data + position.row * width;
    if (c.shift < 0 ? position.time == 0 : position.time + 1 == c.steps) return initial;
    return data + (position.row + c.shift * c.rows) * width;
  }
};

// The values of a state over the steps. They are stored for all steps, as (all rows, width), or else in two buffers
// that are used in turn, each for one step or for a block of `block_steps` steps.
struct State {
  int64_t width, block_steps;
  bool deferred;     // computed after the steps of a block, for all their rows
  const T* initial;  // (batch, width)
  T *zeros, *all_steps, *buffers[2];
  T* extended;    // the state before a step that has more rows than the previous step
  T* final_rows;  // each row's last value

  // Reads the arguments of the state, and allocates its memory.
  void set_up(ArgumentReader& arguments, const Call& c, Arena& shared) {
    width = arguments.size();
    deferred = arguments.size();
    block_steps = arguments.size() ? c.block_steps : 0;
    initial = arguments.pointer();
    all_steps = arguments.pointer();
    final_rows = arguments.pointer();
    const int64_t size = c.rows * width;
    for (T*& buffer : buffers) buffer = all_steps ? nullptr : shared.take<T>(size * (block_steps ? block_steps : 1));
    zeros = initial ? nullptr : shared.take<T>(size);
    if (!initial) initial = zeros;
    extended = c.pointers[0] ? shared.take<T>(size) : nullptr;
  }

  void clear_zeros(int64_t rows) const {
    if (zeros) std::memset(zeros, 0, rows * width * sizeof(T));
  }

  // Where a step writes.
  T* after(const StepPosition& at) const {
    if (all_steps) return all_steps + at.row * width;
    return block_steps ? buffers[at.step / block_steps & 1] + (at.row - at.block_row) * width : buffers[at.step & 1];
  }

  // Where the next step writes, if each buffer holds one step; else null.
  T* other_buffer(int64_t step) const { return all_steps || block_steps ? nullptr : buffers[(step + 1) & 1]; }
};

// Returns where a step finds the state that it reads; `last` is what the previous step wrote. Rows that begin with this
// step take their value from the initial state.
static inline const T* state_before(const ThreadRange& range, const State& s, const T* last, int64_t step, int64_t rows,
                                    int64_t last_rows) {
  if (step == 0) return s.initial;
  if (last_rows >= rows) return last;
  const int64_t from = rows * range.id / range.count, to = rows * (range.id + 1) / range.count;
  for (int64_t r = from; r < to; r++)
    std::memcpy(s.extended + r * s.width, (r < last_rows ? last : s.initial) + r * s.width, s.width * sizeof(T));
  return s.extended;
}

// Stores the final state of rows that end with this step: rows `from` to `to` of what the step wrote.
static inline void store_final(const ThreadRange& range, const State& s, const T* now, int64_t from, int64_t to) {
  if (!s.final_rows) return;
  if (range.by_rows()) from = std::max(from, range.from), to = std::min(to, range.to);
  else if (range.id && range.strategy != TAKE_TURNS) return;
  if (to > from) std::memcpy(s.final_rows + from * s.width, now + from * s.width, (to - from) * s.width * sizeof(T));
}
