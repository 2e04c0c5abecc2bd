// Where the values of a state lie, before and after each step, and other values of every step.
#pragma once
#include "share.h"

// A step, the time that it is of, and where the rows of that time and of its block of steps begin.
struct Place {
  long step, time, first, known;
};

// The values of a state over the steps: all are kept, (all rows, width), or those of two steps, in turn, or of
// two blocks of `steps`.
struct State {
  long width, steps;
  const T* initial;  // (rows of a step, width)
  T *zeros, *kept, *pair[2];
  T *grown, *last;   // the rows before a step that has more than the one before it; each row's last

  void lay(Room& shared, const Call& c, long columns, void* first, void* all, void* final, long many) {
    const long size = c.D[ROWS] * columns;
    width = columns, kept = (T*)all, last = (T*)final, steps = many;
    for (T*& one : pair) one = kept ? nullptr : shared.take<T>(size * (many ? many : 1));
    zeros = first ? nullptr : shared.take<T>(size);
    initial = first ? (const T*)first : zeros;
    grown = c.P[0] ? shared.take<T>(size) : nullptr;
  }

  void begin(long rows) const {
    if (zeros) std::memset(zeros, 0, rows * width * sizeof(T));
  }

  T* after(const Place& at) const {
    if (kept) return kept + at.first * width;
    return steps ? pair[at.step / steps & 1] + (at.first - at.known) * width : pair[at.step & 1];
  }

  // Of the step after it, where those of two steps are kept in turn.
  T* other(long step) const { return kept || steps ? nullptr : pair[(step + 1) & 1]; }
};

// Where a state's rows lie before a step, and those of the last one. Rows that begin with this step come from the
// initial state.
static inline const T* value_before(const Share& h, const State& s, const T* last, long step, long rows, long rows_last) {
  if (step == 0) return s.initial;
  if (rows_last >= rows) return last;
  const long from = rows * h.id / h.count, to = rows * (h.id + 1) / h.count;
  for (long r = from; r < to; r++)
    std::memcpy(s.grown + r * s.width, (r < rows_last ? last : s.initial) + r * s.width, s.width * sizeof(T));
  return s.grown;
}

// Each row's last state, once its steps are over: rows `from` to `to` of what a step has made.
static inline void keep_last(const Share& h, const State& s, const T* now, long from, long to) {
  if (!s.last) return;
  if (h.by_rows) from = std::max(from, h.from), to = std::min(to, h.to);
  else if (h.id && !h.turns) return;
  if (to > from) std::memcpy(s.last + from * s.width, now + from * s.width, (to - from) * s.width * sizeof(T));
}

// Values of every step that a loop reads. Those of a state before each step are shifted by one.
static inline const T* array(const void* base, const void* initial, long shift, const Call& c, const Place& at,
                             long width) {
  if (shift && (shift < 0 ? at.time == 0 : at.time + 1 == c.D[STEPS])) return (const T*)initial;
  return (const T*)base + (at.first + shift * c.D[ROWS]) * width;
}
