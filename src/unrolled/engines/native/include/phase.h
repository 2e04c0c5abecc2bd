// A pass over the panels of a phase: it accumulates the products of a tile and runs the operations that read them.
#pragma once
#include "thread_range.h"

// Loops over the R rows that are computed side by side.
#define FOR_ROWS _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)

// Products that read the same row: `count` panels of sums for each panel of the phase.
struct Group {
  int count;
  int64_t depth;
  T* packed;
  Matrix matrix[MAX_STRIP];
  V* sums;  // of the thread's own strips, as (strip, row, panel, product)
};

// The elementwise operations of a phase, for a tile of rows and panels that begins at `row` and `panel`. The sums of
// each group are (row, panel, product). It may run several steps, one after another.
template <class Step>
using Pointwise = void (*)(const Step& s, int64_t row, int rows, int64_t panel, int panels, const V* sums,
                           const V* const* hoisted, int64_t steps);

// How one thread runs a phase: its strips of panels, and the products that it accumulates. N groups are accumulated in
// every step. M groups are hoisted: they read what is known before the loop, and are computed for a block of steps.
template <int N, int M> struct Phase {
  int64_t width, panels, strips, first, last;  // the thread's strips are first .. last
  int strip, rows;                          // the size of a tile, in panels and rows
  Group groups[N + M ? N + M : 1];

  static constexpr int ALL = N + M;

  // Chooses the size of tiles. `threads` is the requested number of threads, not the actual one: the layout of packed
  // matrices, which are kept from call to call, must not depend on how many threads are available.
  void partition(const ThreadRange& range, int64_t threads, int64_t columns) {
    width = columns;
    panels = (width + L - 1) / L;
    strip = ALL ? MAX_STRIP : (int)std::max<int64_t>(1, panels);
    rows = MAX_ROWS;
    const int target = range.batch <= MAX_ROWS_WIDE_STRIPS ? MAX_STRIP : STRIP;
    for (int g = 0; g < ALL; g++) strip = std::min(strip, std::max(1, target / groups[g].count));
    strip = (int)std::min<int64_t>(strip, (panels + threads - 1) / threads);
    for (int g = 0; g < ALL; g++) rows = std::min(rows, rows_of(strip * groups[g].count));
    strips = (panels + strip - 1) / strip;
    first = range.all_panels() ? 0 : strips * range.id / range.count;
    last = range.all_panels() ? strips : strips * (range.id + 1) / range.count;
  }

  int panels_of(int64_t s) const { return (int)std::min<int64_t>(strip, panels - s * strip); }

  // Allocates the packed matrices, which all threads share. `prepacked` holds the caller's memory for them, if any.
  void allocate_packed(Arena& shared, bool pack_per_step, T* const* prepacked) {
    for (int g = 0; g < ALL; g++)
      groups[g].packed = pack_per_step  ? nullptr
                         : prepacked[g] ? prepacked[g]
                                        : shared.take<T>(panels * groups[g].count * groups[g].depth * L);
  }

  // Allocates the sums, which each thread has for itself.
  void allocate_sums(Arena& own, int64_t hoisted_rows, int64_t batch, bool pack_per_step) {
    for (int g = 0; g < ALL; g++) {
      const int64_t row_count = g >= N ? hoisted_rows : pack_per_step ? batch : 0;
      groups[g].sums = own.take<V>((last - first) * strip * groups[g].count * row_count);
    }
  }

  void pack_strip(const ThreadRange& range, const Group& g, T* to, int64_t from, int64_t depth, int64_t s) const {
    const int strip_panels = panels_of(s);
    for (int u = 0; u < strip_panels; u++)
      for (int q = 0; q < g.count; q++) {
        Matrix m = g.matrix[q];
        m.data += from * m.k;
        range.products->pack(to + (u * g.count + q) * L, strip_panels * g.count, m, depth, (s * strip + u) * L, width);
      }
  }

  // Packs the thread's own strips. If threads split the rows, each packs an equal part of the strips.
  void pack(const ThreadRange& range) const {
    const int64_t begin = strips * range.id / range.count, end = strips * (range.id + 1) / range.count;
    for (int64_t s = begin; s < end; s++)
      for (int g = 0; g < ALL; g++)
        pack_strip(range, groups[g], groups[g].packed + s * strip * groups[g].count * groups[g].depth * L, 0,
                   groups[g].depth, s);
  }

  V* sums_of(const Group& g, int64_t s, int64_t row_count) const {
    return g.sums + (s - first) * strip * g.count * row_count;
  }

  // Computes the sums of a strip for `row_count` rows into the group's own memory, which has `stored_rows` per strip.
  void sum(const ThreadRange& range, const Group& g, int64_t s, const T* x, int64_t row_count,
           int64_t stored_rows) const {
    const int row_sums = panels_of(s) * g.count;
    const int max_rows = rows_of(row_sums);
    const int64_t tiles = (row_count + max_rows - 1) / max_rows;
    V* const sums = sums_of(g, s, stored_rows);
    alignas(64) T block[BLOCK * MAX_STRIP * L];
    const int64_t step = range.pack_per_step ? BLOCK : g.depth;
    for (int64_t k = 0; k < g.depth; k += step) {
      const int64_t terms = std::min(step, g.depth - k);
      const T* w = block;
      if (range.pack_per_step)
        pack_strip(range, g, block, k, terms, s);
      else
        w = g.packed + s * strip * g.count * g.depth * L;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = row_count * t / tiles;
        const int tile_rows = (int)(row_count * (t + 1) / tiles - row);
        range.products->tiles[tile_rows - 1][row_sums - 1](x + row * g.depth + k, g.depth, 1, w, terms, k > 0,
                                                           sums + row * row_sums);
      }
    }
  }

  // Computes the hoisted sums of `row_count` rows, of one step or several.
  void hoist(const ThreadRange& range, const T* const* x, int64_t row_count, int64_t block_rows) const {
    for (int64_t s = first; s < last; s++)
      for (int m = N; m < ALL; m++) sum(range, groups[m], s, x[m], row_count, block_rows);
  }

  // Runs steps without products. It goes through rows and panels in memory order.
  template <class Step>
  void stream(const Step& s, const ThreadRange& range, int64_t shift, int64_t block_rows, int64_t steps,
              Pointwise<Step> pointwise) const {
    const int64_t row_count = std::min(range.to, s.rows) - range.from;
    if (row_count <= 0) return;
    const V* hoisted[M ? M : 1];
    for (int64_t k = first; k < last; k++) {
      const int strip_panels = panels_of(k);
      for (int m = 0; m < M; m++)
        hoisted[m] = sums_of(groups[N + m], k, block_rows) + shift * strip_panels * groups[N + m].count;
      pointwise(s, range.from, (int)row_count, k * strip, strip_panels, nullptr, hoisted, steps);
    }
  }

  // Runs one step, or several if there are no products. The rows of the step begin `shift` rows after the first hoisted
  // row.
  template <class Step>
  void sweep(const Step& s, const ThreadRange& range, const T* const* x, int64_t shift, int64_t block_rows,
             int64_t steps, Pointwise<Step> pointwise) const {
    if constexpr (N == 0) return stream(s, range, shift, block_rows, steps, pointwise);
    const int64_t to = std::min(range.to, s.rows), row_count = to - range.from, tiles = (row_count + rows - 1) / rows;
    if (row_count <= 0) return;
    V sums[(N ? N : 1) * TILE_SUMS];
    const V* hoisted[M ? M : 1];
    for (int64_t j = first; j < last; j++) {
      const int64_t k = s.descending ? last - 1 - (j - first) : j;  // what was read last is still in the cache
      const int strip_panels = panels_of(k);
      if (range.pack_per_step)
        for (int g = 0; g < N; g++)
          sum(range, groups[g], k, x[g] + range.from * groups[g].depth, row_count, range.batch);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = row_count * t / tiles;
        const int tile_rows = (int)(row_count * (t + 1) / tiles - row);
        V* at = sums;
        for (int g = 0; g < N; g++) {
          const Group& group = groups[g];
          const int row_sums = strip_panels * group.count;
          if (range.pack_per_step)
            std::memcpy(at, sums_of(group, k, range.batch) + row * row_sums, tile_rows * row_sums * sizeof(V));
          else
            range.products->tiles[tile_rows - 1][row_sums - 1](
                x[g] + (range.from + row) * group.depth, group.depth, 1,
                group.packed + k * strip * group.count * group.depth * L, group.depth, false, at);
          at += tile_rows * row_sums;
        }
        for (int m = 0; m < M; m++)
          hoisted[m] = sums_of(groups[N + m], k, block_rows) + (shift + row) * strip_panels * groups[N + m].count;
        pointwise(s, range.from + row, tile_rows, k * strip, strip_panels, sums, hoisted, 1);
      }
    }
  }
};
