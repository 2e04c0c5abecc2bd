// What every generated loop stands on: how a thread goes through the steps. What a step does is in the generated
// source, in its structs Work and Step.
#pragma once
#include "phase.h"
#include "state.h"

constexpr long AHEAD = 1024;  // elements: how far before its use what is read once is fetched

// What a step has beside the places of its values.
struct Moment {
  const int64_t* D;
  long rows;
  bool turned;  // from the last strip to the first

  // The rows from what a step reads to what the next one reads.
  long stride() const { return D[BACK] ? -rows : rows; }
};

// What a pass of `rows` rows of each step reads some KiB after one of them: how many rows from it that lies.
struct Ahead {
  long rows, stride, steps, more;

  Ahead(const Moment& s, long width, long rows) : rows(rows), stride(s.stride()) {
    const long far = 1 + AHEAD / width;
    steps = far / rows, more = far % rows;
  }

  long from(long row) const {
    return row + more < rows ? steps * stride + more : (steps + 1) * stride + more - rows;
  }
};

// The steps of a call in their order, and their rows.
struct Order {
  const int64_t *D, *starts;  // where the rows of each time begin, if not all have as many

  long start(long time) const { return starts ? starts[time] : time * D[ROWS]; }
  long time(long step) const { return D[BACK] ? D[STEPS] - 1 - step : step; }
  long first(long step) const { return start(time(step)); }
  long end(long step) const { return start(time(step) + 1); }
  long rows(long step) const { return end(step) - first(step); }
  long rows_after(long step) const { return step + 1 < D[STEPS] ? rows(step + 1) : 0; }
  Place at(long step, long known) const { return {step, time(step), first(step), known}; }
  bool closes(long step) const { return (step + 1) % D[HOISTED] == 0 || step + 1 == D[STEPS]; }
};

// What one thread does of a call.
template <class Work, class Step> void work(void* what, int id, int count) {
  Call& c = *(Call*)what;
  const int64_t* const D = c.D;
  const Order order{D, (const int64_t*)c.P[0]};
  Work w;
  Room shared{c.room}, own{c.room + c.shared + id * c.own};
  w.lay(c, share(c, id, count), shared, own);
  const Share& h = w.h;
  if (!D[DIRECT] && !D[PACKED]) {
    w.pack();
    if (h.all_panels()) c.meeting.wait(count);
  }
  Step s;
  s.D = D;
  w.keep(s);
  const long room_rows = D[HOISTED] * (h.by_rows ? h.to - h.from : D[ROWS]);
  long known = 0, end = 0, rows_last = 0;
  for (long step = 0; step < D[STEPS]; step++) {
    const long block = step / D[HOISTED], begun = block * D[HOISTED], rows = order.rows(step);
    if (step == begun) {  // what is known before the steps of a block
      if (h.turns && block % count != id) {
        step += D[HOISTED] - 1;
        continue;
      }
      const long last = std::min<long>(step + D[HOISTED], D[STEPS]) - 1;
      known = std::min(order.first(step), order.first(last));
      end = std::max(order.end(step), order.end(last));
      w.hoist(c, known + h.from, h.by_rows ? h.to - h.from : end - known, room_rows);
      if (h.turns && step) {
        spin([&] { return c.blocks.load(std::memory_order_acquire) == block; });
        w.place(s, c, order.at(step - 1, known));
        rows_last = rows;
      }
    }
    s.rows = rows;
    s.turned = step & 1;
    w.before(s, step, rows, rows_last);
    w.place(s, c, order.at(step, known));
    if (rows_last && rows_last < rows) h.meet();
    long steps = 1;
    if (Work::APART && !order.starts && step)  // the first and the last one may read what lies elsewhere
      steps = std::max(1L, std::min<long>(begun + D[HOISTED], D[STEPS] - 1) - step);
    w.step(s, order.first(step) - known, room_rows, steps);
    if (steps > 1) {
      step += steps - 1;
      w.place(s, c, order.at(step, known));
    }
    if (!Work::APART || order.starts || step + 1 == D[STEPS]) h.meet();
    w.finish(s, std::min(order.rows_after(step), rows), rows);
    rows_last = rows;
    if (h.turns && order.closes(step)) c.blocks.store(block + 1, std::memory_order_release);
    if (Work::LATE && order.closes(step)) {  // what no step reads, for all rows of the block
      Step all = s;
      h.meet();
      w.place(all, c, {step, std::min(order.time(begun), order.time(step)), known, known});
      all.rows = h.by_rows ? rows : end - known;
      w.late(all, room_rows);
      h.meet();
      for (long k = begun; k <= step && (order.starts || step + 1 == D[STEPS]); k++)
        w.finish_late(all, order.first(k) - known, std::min(order.rows_after(k), order.rows(k)), order.rows(k));
    }
  }
}

// The memory of a call, for so many threads.
template <class Work> bool prepare(void* what, int count) {
  Call& c = *(Call*)what;
  Room shared{nullptr};
  size_t most = 0;
  for (int id = 0; id < count; id++) {
    Work w;
    Room own{nullptr};
    shared.used = 0;
    w.lay(c, share(c, id, count), shared, own);
    most = std::max(most, own.used);
  }
  c.own = most;
  c.shared = shared.used;
  c.room = c.products->room(shared.used + count * most);
  if (!c.room) return false;
  Room all{c.room}, own{c.room};
  Work w;
  w.lay(c, share(c, 0, count), all, own);
  w.begin(c.D[ROWS]);
  return true;
}

template <class Work, class Step> bool call(const int64_t* sizes, void* const* pointers, const Products* products) {
  Call c{sizes, pointers, products, nullptr, 0, 0, {}, {}};
  return products->team((int)sizes[THREADS], prepare<Work>, work<Work, Step>, &c);
}
