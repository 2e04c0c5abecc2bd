// Included by every generated kernel: how a thread goes through the time steps. What a step computes is in the
// generated source, in the structs Loop and Step.
#pragma once
#include "phase.h"
#include "state.h"

// The arguments of a step that are the same in every kernel. The generated Step adds pointers to values.
struct StepContext {
  const int64_t* D;  // the sizes of the kernel
  int64_t rows;
  bool reverse;
  bool descending;  // go through the strips from the last to the first

  // Distance in rows from the values of one step to those of the next.
  int64_t stride() const { return reverse ? -rows : rows; }
};

// Distance in rows from a row to the one to prefetch, in a pass over `rows` rows of each step.
struct PrefetchDistance {
  int64_t rows, stride, steps, more;

  PrefetchDistance(const StepContext& s, int64_t width, int64_t rows) : rows(rows), stride(s.stride()) {
    const int64_t distance = 1 + PREFETCH_ELEMENTS / width;
    steps = distance / rows, more = distance % rows;
  }

  int64_t from(int64_t row) const {
    return row + more < rows ? steps * stride + more : (steps + 1) * stride + more - rows;
  }
};

// The order of the steps of a call, and the rows of each.
struct StepOrder {
  const CallArguments& c;
  const int64_t* starts;  // the first row of each time, if the number of rows varies; else null

  int64_t start(int64_t time) const { return starts ? starts[time] : time * c.rows; }
  int64_t time(int64_t step) const { return c.reverse ? c.steps - 1 - step : step; }
  int64_t first(int64_t step) const { return start(time(step)); }
  int64_t end(int64_t step) const { return start(time(step) + 1); }
  int64_t rows(int64_t step) const { return end(step) - first(step); }
  int64_t rows_after(int64_t step) const { return step + 1 < c.steps ? rows(step + 1) : 0; }
  StepPosition at(int64_t step, int64_t block_row) const { return {step, time(step), first(step), block_row}; }
  bool ends_block(int64_t step) const { return (step + 1) % c.block_steps == 0 || step + 1 == c.steps; }
};

// Runs one thread's part of a call.
template <class Loop, class Step> void run_thread(void* argument, int id, int count) {
  Call& c = *(Call*)argument;
  const StepOrder order{c, (const int64_t*)c.pointers[0]};
  Loop loop;
  Arena shared{c.memory}, own{c.memory + c.shared + id * c.own};
  loop.allocate(c, thread_range(c, id, count), shared, own);
  const ThreadRange& range = loop.range;
  if (!c.pack_per_step && !c.packed) {
    loop.pack();
    if (range.all_panels()) c.barrier.wait(count);
  }
  Step s;
  s.D = c.sizes;
  s.reverse = c.reverse != 0;
  loop.set_scratch(s);
  const int64_t block_rows = c.block_steps * (range.by_rows ? range.to - range.from : c.rows);
  int64_t block_row = 0, block_end = 0, last_rows = 0;
  for (int64_t step = 0; step < c.steps; step++) {
    const int64_t block = step / c.block_steps, block_step = block * c.block_steps, rows = order.rows(step);
    if (step == block_step) {  // input products of all steps of the block
      if (range.turns && block % count != id) {
        step += c.block_steps - 1;
        continue;
      }
      const int64_t last = std::min<int64_t>(step + c.block_steps, c.steps) - 1;
      block_row = std::min(order.first(step), order.first(last));
      block_end = std::max(order.end(step), order.end(last));
      loop.hoist(c, block_row + range.from, range.by_rows ? range.to - range.from : block_end - block_row, block_rows);
      if (range.turns && step) {
        spin_until([&] { return c.finished_blocks.load(std::memory_order_acquire) == block; });
        loop.set_pointers(s, c, order.at(step - 1, block_row));
        last_rows = rows;
      }
    }
    s.rows = rows;
    s.descending = step & 1;
    loop.set_state_before(s, step, rows, last_rows);
    loop.set_pointers(s, c, order.at(step, block_row));
    if (last_rows && last_rows < rows) range.synchronize();
    int64_t steps = 1;
    if (Loop::COLUMNWISE && !order.starts && step)  // the first and the last step may find their states elsewhere
      steps = std::max<int64_t>(1, std::min<int64_t>(block_step + c.block_steps, c.steps - 1) - step);
    loop.step(s, order.first(step) - block_row, block_rows, steps);
    if (steps > 1) {
      step += steps - 1;
      loop.set_pointers(s, c, order.at(step, block_row));
    }
    if (!Loop::COLUMNWISE || order.starts || step + 1 == c.steps) range.synchronize();
    loop.store_final_states(s, std::min(order.rows_after(step), rows), rows);
    last_rows = rows;
    if (range.turns && order.ends_block(step)) c.finished_blocks.store(block + 1, std::memory_order_release);
    if (Loop::DEFERRED && order.ends_block(step)) {  // values that no step reads, for all rows of the block
      Step all = s;
      range.synchronize();
      loop.set_pointers(all, c,
                        {step, std::min(order.time(block_step), order.time(step)), block_row, block_row});
      all.rows = range.by_rows ? rows : block_end - block_row;
      loop.deferred(all, block_rows);
      range.synchronize();
      for (int64_t k = block_step; k <= step && (order.starts || step + 1 == c.steps); k++)
        loop.store_final_deferred(all, order.first(k) - block_row, std::min(order.rows_after(k), order.rows(k)),
                                  order.rows(k));
    }
  }
}

// Allocates the memory of a call that runs on `count` threads.
template <class Loop> bool prepare(void* argument, int count) {
  Call& c = *(Call*)argument;
  Arena shared{nullptr};
  size_t most = 0;
  for (int id = 0; id < count; id++) {
    Loop loop;
    Arena own{nullptr};
    shared.used = 0;
    loop.allocate(c, thread_range(c, id, count), shared, own);
    most = std::max(most, own.used);
  }
  c.own = most;
  c.shared = shared.used;
  c.memory = c.products->scratch(shared.used + count * most);
  if (!c.memory) return false;
  Arena all{c.memory}, own{c.memory};
  Loop loop;
  loop.allocate(c, thread_range(c, 0, count), all, own);
  loop.clear_zeros(c.rows);
  return true;
}

template <class Loop, class Step> bool call(const CallArguments& arguments) {
  Call c{arguments, nullptr, 0, 0, {}, {}};
  return c.products->run((int)c.threads, prepare<Loop>, run_thread<Loop, Step>, &c);
}
