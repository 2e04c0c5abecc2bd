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
// If it is columnwise, each column of a step depends only on the same column of the previous step, so threads that split
// the columns needn't synchronize after each step.
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
template <class Loop> void run_thread(void* argument, int id, int count) {
  Call& c = *(Call*)argument;
  const StepOrder order{c, (const int64_t*)c.pointers[0]};
  Loop loop;
  Arena shared{c.memory}, own{c.memory + c.shared + id * c.own};
  loop.set_up(c, thread_range(c, id, count), shared, own);
  const ThreadRange& range = loop.range;
  if (!c.pack_per_step && !c.packed) {
    loop.pack();
    if (range.all_panels()) c.barrier.wait(count);
  }
  typename Loop::Step s;
  loop.begin(s);
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
      loop.hoist(block_row + range.from, range.by_rows ? range.to - range.from : block_end - block_row, block_rows);
      if (range.turns && step) {
        spin_until([&] { return c.finished_blocks.load(std::memory_order_acquire) == block; });
        loop.set_pointers(s, c, order.at(step - 1, block_row));
        last_rows = rows;
      }
    }
    s.rows = rows;
    s.stride = c.reverse ? -rows : rows;
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
    loop.store_final_states(s, false, 0, std::min(order.rows_after(step), rows), rows);
    last_rows = rows;
    if (range.turns && order.ends_block(step)) c.finished_blocks.store(block + 1, std::memory_order_release);
    if (Loop::DEFERRED && order.ends_block(step)) {  // values that no step reads, for all rows of the block
      typename Loop::Step all = s;
      range.synchronize();
      loop.set_pointers(all, c,
                        {step, std::min(order.time(block_step), order.time(step)), block_row, block_row});
      all.rows = range.by_rows ? rows : block_end - block_row;
      all.stride = c.reverse ? -all.rows : all.rows;
      loop.deferred(all, block_rows);
      range.synchronize();
      for (int64_t k = block_step; k <= step && (order.starts || step + 1 == c.steps); k++)
        loop.store_final_states(all, true, order.first(k) - block_row, std::min(order.rows_after(k), order.rows(k)),
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
    loop.set_up(c, thread_range(c, id, count), shared, own);
    most = std::max(most, own.used);
  }
  c.own = most;
  c.shared = shared.used;
  c.memory = c.products->scratch(shared.used + count * most);
  if (!c.memory) return false;
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
