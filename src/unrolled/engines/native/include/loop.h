// Included by every generated kernel: how a thread goes through the time steps. The generated source defines what a
// step computes, as a type of Loop.
#pragma once
#include <tuple>

#include "phase.h"
#include "state.h"

// Phases and scalars that run one after another.
template <class... Parts> struct Sequence {
  static constexpr bool empty = sizeof...(Parts) == 0;
  std::tuple<Parts...> parts;

  template <class F> void each(F f) {
    std::apply([&](auto&... part) { (f(part), ...); }, parts);
  }
  template <class F> void each(F f) const {
    std::apply([&](const auto&... part) { (f(part), ...); }, parts);
  }
};

// A kernel, as one thread sees it: its memory, and what it computes in every step and for a block of steps afterwards.
// If it is columnwise, each column of a step depends only on the same column of the previous step. Then threads that
// share the columns needn't synchronize after each step.
template <class Values, bool COLUMNWISE_STEPS, class StepParts, class DeferredParts> struct Loop {
  using Step = Values;
  static constexpr bool COLUMNWISE = COLUMNWISE_STEPS, DEFERRED = !DeferredParts::empty;
  ThreadRange range, block_range;
  Input in[Step::inputs + 1];
  State states[Step::states + 1];
  Array saved[Step::saves + 1], scratch[Step::buffers + 1];
  bool whole_block[Step::buffers + 1];  // whether a scratch buffer has all rows of a block
  Column scalar[Step::scalars + 1];
  const int64_t* sizes;
  StepParts step_parts;
  DeferredParts deferred_parts;

  // Reads the arguments of the kernel, and allocates its memory.
  void set_up(const Call& c, const ThreadRange& thread_range, Arena& shared, Arena& own) {
    range = thread_range, block_range = thread_range.of_block(c);
    ArgumentReader arguments{c.sizes, c.pointers + 1};
    for (int k = 0; k < Step::inputs; k++) in[k].set_up(arguments);
    for (int k = 0; k < Step::states; k++) states[k].set_up(arguments, c, shared);
    for (int k = 0; k < Step::saves; k++) saved[k] = {arguments.pointer(), arguments.size()};
    for (int k = 0; k < Step::buffers; k++) {
      scratch[k].width = arguments.size();
      whole_block[k] = arguments.size();
      scratch[k].data = shared.take<T>((whole_block[k] ? c.block_steps : 1) * c.rows * scratch[k].width);
    }
    for (int k = 0; k < Step::scalars; k++) scalar[k].data = own.take<T>((DEFERRED ? c.block_steps : 1) * c.rows);
    step_parts.each([&](auto& part) { part.set_up(arguments, c, range, shared, own); });
    deferred_parts.each([&](auto& part) { part.set_up(arguments, c, block_range, shared, own); });
    sizes = arguments.sizes;
  }

  void clear_zeros(int64_t rows) const {
    for (int k = 0; k < Step::states; k++) states[k].clear_zeros(rows);
  }

  void pack() const {
    step_parts.each([&](const auto& part) { part.pack(range); });
    deferred_parts.each([&](const auto& part) { part.pack(range); });
  }

  // Fills in what is the same in all steps.
  void begin(Step& s) const {
    s.sizes = sizes;
    for (int k = 0; k < Step::inputs; k++) s.in[k].width = in[k].width;
    for (int k = 0; k < Step::saves; k++) s.saved[k].width = saved[k].width;
    for (int k = 0; k < Step::buffers; k++) s.scratch[k] = scratch[k];
    for (int k = 0; k < Step::scalars; k++) s.scalar[k] = scalar[k];
    for (int k = 0; k < Step::states; k++) s.old[k].width = s.next[k].width = states[k].width;
  }

  void set_pointers(Step& s, const Call& c, const StepPosition& at) const {
    for (int k = 0; k < Step::inputs; k++) s.in[k].data = in[k].at(c, at);
    for (int k = 0; k < Step::saves; k++) s.saved[k].data = saved[k].data + at.row * saved[k].width;
    for (int k = 0; k < Step::buffers; k++)
      if (whole_block[k]) s.scratch[k].data = scratch[k].data + (at.row - at.block_row) * scratch[k].width;
    for (int k = 0; k < Step::states; k++) s.next[k].data = states[k].after(at);
    for (int k = 0; k < Step::states; k++) s.other[k] = states[k].other_buffer(at.step);
  }

  void set_state_before(Step& s, int64_t step, int64_t rows, int64_t last_rows) const {
    for (int k = 0; k < Step::states; k++)
      if (!states[k].deferred)
        s.old[k].data = (T*)state_before(range, states[k], s.next[k].data, step, rows, last_rows);
  }

  // Stores the final states of rows that end with a step: rows `from` to `to` of those that begin at `row` of s. States
  // that are deferred are stored after the others.
  void store_final_states(const Step& s, bool deferred, int64_t row, int64_t from, int64_t to) const {
    for (int k = 0; k < Step::states; k++)
      if (states[k].deferred == deferred)
        store_final(range, states[k], s.next[k].data + row * states[k].width, from, to);
  }

  // Computes the hoisted sums of `row_count` rows, from row `begin` of all time steps on.
  void hoist(int64_t begin, int64_t row_count, int64_t block_rows) const {
    step_parts.each([&](const auto& part) { part.hoist(range, begin, row_count, block_rows); });
    deferred_parts.each([&](const auto& part) { part.hoist(range, begin, row_count, block_rows); });
  }

  // Runs a step, or several if it is columnwise. Its rows begin `shift` rows after those of the block.
  void step(const Step& s, int64_t shift, int64_t block_rows, int64_t steps) const {
    if (!COLUMNWISE) steps = 1;
    step_parts.each([&](const auto& part) { part.run(s, range, shift, block_rows, steps); });
  }

  // Computes the deferred values of all rows of a block.
  void deferred(const Step& s, int64_t block_rows) const {
    deferred_parts.each([&](const auto& part) { part.run(s, block_range, 0, block_rows, 1); });
  }
};

// Steps that are run together: `first` .. `last`, and their rows among the rows of all times.
struct Block {
  int64_t first, last, row, rows;
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
  // How many rows go on after a step.
  int64_t rows_after(int64_t step) const { return step + 1 < c.steps ? std::min(rows(step + 1), rows(step)) : 0; }
  StepPosition at(int64_t step, int64_t block_row) const { return {step, time(step), first(step), block_row}; }

  Block block(int64_t step) const {
    const int64_t last = std::min(step + c.block_steps, c.steps) - 1, row = std::min(first(step), first(last));
    return {step, last, row, std::max(end(step), end(last)) - row};
  }
};

// One thread's part of a call. There are three strategies to share the work.
template <class Loop> class Worker {
  Call& c;
  const StepOrder order;
  Loop loop;
  typename Loop::Step s;
  int64_t block_rows;     // rows of a block that this thread stores hoisted sums of
  int64_t last_rows = 0;  // rows of the step before

 public:
  Worker(Call& call, int id, int count) : c(call), order{call, (const int64_t*)call.pointers[0]} {
    Arena shared{c.memory}, own{c.memory + c.shared + id * c.own};
    loop.set_up(c, thread_range(c, id, count), shared, own);
    loop.begin(s);
    if (count == 1) loop.clear_zeros(c.rows);
    block_rows = c.block_steps * (loop.range.by_rows() ? loop.range.to - loop.range.from : c.rows);
    if (!c.pack_per_step && !c.packed) {
      loop.pack();
      if (loop.range.all_panels()) c.barrier.wait(count);
    }
  }

  void run() {
    switch (loop.range.strategy) {
      case SHARE_COLUMNS: return share_columns();
      case SHARE_ROWS: return share_rows();
      case TAKE_TURNS: return take_turns();
    }
  }

 private:
  // All threads run all steps together, and synchronize in each.
  void share_columns() {
    for (int64_t step = 0; step < c.steps; step += c.block_steps) {
      const Block block = order.block(step);
      loop.hoist(block.row, block.rows, block_rows);
      run_steps(block);
      if (Loop::DEFERRED) run_deferred(block, block.rows);
    }
  }

  // Each thread runs all steps of its own rows.
  void share_rows() {
    const ThreadRange& range = loop.range;
    for (int64_t step = 0; step < c.steps; step += c.block_steps) {
      const Block block = order.block(step);
      loop.hoist(block.row + range.from, range.to - range.from, block_rows);
      run_steps(block);
      if (Loop::DEFERRED) run_deferred(block, c.rows);
    }
  }

  // Each thread runs whole blocks. While it computes the hoisted sums of a block, others run the blocks before.
  void take_turns() {
    const ThreadRange& range = loop.range;
    for (int64_t number = range.id; number * c.block_steps < c.steps; number += range.count) {
      const Block block = order.block(number * c.block_steps);
      loop.hoist(block.row, block.rows, block_rows);
      if (number) {
        spin_until([&] { return c.finished_blocks.load(std::memory_order_acquire) == number; });
        loop.set_pointers(s, c, order.at(block.first - 1, block.row));
        last_rows = c.rows;
      }
      run_steps(block);
      c.finished_blocks.store(number + 1, std::memory_order_release);
    }
  }

  void run_steps(const Block& block) {
    const ThreadRange& range = loop.range;
    for (int64_t step = block.first; step <= block.last; step++) {
      const int64_t rows = order.rows(step), shift = order.first(step) - block.row;
      s.rows = rows;
      s.stride = c.reverse ? -rows : rows;
      s.descending = step & 1;
      loop.set_state_before(s, step, rows, last_rows);
      loop.set_pointers(s, c, order.at(step, block.row));
      if (last_rows && last_rows < rows) range.synchronize();
      const int64_t steps = steps_at_once(step, block);
      loop.step(s, shift, block_rows, steps);
      if (steps > 1) {
        step += steps - 1;
        loop.set_pointers(s, c, order.at(step, block.row));
      }
      if (!Loop::COLUMNWISE || order.starts || step + 1 == c.steps) range.synchronize();
      loop.store_final_states(s, false, 0, order.rows_after(step), rows);
      last_rows = rows;
    }
  }

  // How many steps a columnwise loop can run in one go. The first and the last may find their states elsewhere.
  int64_t steps_at_once(int64_t step, const Block& block) const {
    if (!Loop::COLUMNWISE || order.starts || step == 0) return 1;
    return std::max<int64_t>(1, std::min(block.last + 1, c.steps - 1) - step);
  }

  // A second kernel: computes the values that no step reads, for `rows` rows of a block.
  void run_deferred(const Block& block, int64_t rows) {
    loop.range.synchronize();
    typename Loop::Step all = s;
    const int64_t time = std::min(order.time(block.first), order.time(block.last));
    loop.set_pointers(all, c, {block.last, time, block.row, block.row});
    all.rows = rows;
    all.stride = c.reverse ? -rows : rows;
    loop.deferred(all, block_rows);
    loop.range.synchronize();
    if (!order.starts && block.last + 1 < c.steps) return;
    for (int64_t k = block.first; k <= block.last; k++)
      loop.store_final_states(all, true, order.first(k) - block.row, order.rows_after(k), order.rows(k));
  }
};

template <class Loop> void run_thread(void* call, int id, int count) { Worker<Loop>(*(Call*)call, id, count).run(); }

// Allocates the memory of a call that runs on `count` threads.
template <class Loop> bool prepare(void* argument, int count) {
  Call& c = *(Call*)argument;
  Arena shared{nullptr};
  size_t most = 0;
  for (int id = 0; id < count; id++) {
    Loop loop;
    Arena own{nullptr};
    shared.used = 0;
    loop.set_up(c, thread_range(c, id, count), shared, own);
    most = std::max(most, own.used);
  }
  c.own = most;
  c.shared = shared.used;
  c.memory = c.products->scratch(shared.used + count * most);
  if (!c.memory) return false;
  if (count == 1) return true;  // the only thread clears them itself
  Arena all{c.memory}, own{c.memory};
  Loop loop;
  loop.set_up(c, thread_range(c, 0, count), all, own);
  loop.clear_zeros(c.rows);
  return true;
}

template <class Loop> bool call(const CallArguments& arguments, void* const* pointers) {
  Call c{arguments, pointers, nullptr, 0, 0, {}, {}};
  return c.products->run((int)c.threads, prepare<Loop>, run_thread<Loop>, &c);
}
