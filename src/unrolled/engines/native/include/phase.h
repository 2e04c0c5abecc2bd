// A pass over the panels of a phase: it accumulates the products of a tile and runs the operations that read them.
#pragma once
#include "scalars.h"

// Products that read the same row: `count` panels of sums for each panel of the phase.
struct Group {
  int count;
  int64_t depth;
  WeightFormat format;
  T scale;  // the fixed scale of rows in int8, or 0
  int64_t lines, stride;  // of a packed column, and of the rows that tiles read
  T* packed;
  const T* row;  // of a hoisted group, from the first row of all time steps on; else null
  Matrix matrix[MAX_STRIP];
  V* sums;  // of the thread's own strips, as (strip, row, panel, product)
  T* quantized;  // memory for rows in int8

  // Returns the rows as tiles read them: quantizes them first if that is the format.
  const T* prepare(const Products& products, const T* x, int64_t rows) const {
    if (format != INT8) return x;
    const auto quantize = products.formats[INT8]->quantize;
    for (int64_t r = 0; r < rows; r++) quantize(x + r * depth, depth, scale, quantized + r * stride);
    return quantized;
  }

  TileProduct tile(const Products& products, int rows, int sums) const {
    return format ? products.formats[format]->tiles[rows - 1][sums - 1] : products.tiles[rows - 1][sums - 1];
  }
};

// How one thread runs a phase: its strips of panels, and the products that it accumulates. N groups are accumulated in
// every step. M groups are hoisted: they read what is known before the loop, and are computed for a block of steps.
template <int N, int M> struct PhasePlan {
  int64_t width, panels, strips, first, last;  // the thread's strips are first .. last
  int strip, rows;                          // the size of a tile, in panels and rows
  Group groups[N + M ? N + M : 1];

  static constexpr int ALL = N + M;

  // Reads the arguments of the phase, and allocates the memory for packed matrices and sums.
  void set_up(ArgumentReader& arguments, const Call& c, const ThreadRange& range, Arena& shared, Arena& own) {
    const int64_t columns = arguments.size();
    for (int g = 0; g < ALL; g++) {
      groups[g].count = (int)arguments.size();
      groups[g].depth = arguments.size();
      groups[g].format = (WeightFormat)arguments.size();
      const int32_t bits = (int32_t)arguments.size();
      float scale;
      std::memcpy(&scale, &bits, sizeof scale);
      groups[g].scale = scale;
      groups[g].lines = packed_lines(groups[g].format, groups[g].depth);
      groups[g].stride = row_stride(groups[g].format, groups[g].depth);
      groups[g].packed = arguments.pointer();
      groups[g].row = g < N ? nullptr : arguments.pointer();
      for (int q = 0; q < groups[g].count; q++)
        groups[g].matrix[q] = {arguments.pointer(), arguments.size(), arguments.size()};
    }
    partition(range, c.strategy == SHARE_COLUMNS ? c.threads : 1, columns);
    allocate_packed(shared, c.pack_per_step);
    allocate_sums(own, c.block_steps * c.rows, range.batch, c.pack_per_step);
  }

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

  // Allocates the packed matrices, which all threads share, unless the caller keeps them.
  void allocate_packed(Arena& shared, bool pack_per_step) {
    if (pack_per_step) return;
    for (int g = 0; g < ALL; g++)
      if (!groups[g].packed) groups[g].packed = shared.take<T>(panels * groups[g].count * groups[g].lines * L);
  }

  // Allocates the sums, which each thread has for itself.
  void allocate_sums(Arena& own, int64_t hoisted_rows, int64_t batch, bool pack_per_step) {
    for (int g = 0; g < ALL; g++) {
      const int64_t row_count = g >= N ? hoisted_rows : pack_per_step ? batch : 0;
      groups[g].sums = own.take<V>((last - first) * strip * groups[g].count * row_count);
      const int64_t quantized_rows = groups[g].format != INT8 ? 0 : g >= N ? hoisted_rows : batch;
      groups[g].quantized = own.take<T>(quantized_rows * groups[g].stride);
    }
  }

  void pack_strip(const ThreadRange& range, const Group& g, T* to, int64_t from, int64_t depth, int64_t s) const {
    const int strip_panels = panels_of(s);
    for (int u = 0; u < strip_panels; u++)
      for (int q = 0; q < g.count; q++) {
        Matrix m = g.matrix[q];
        m.data += from * m.k;
        const PackPanel pack_panel = g.format ? range.products->formats[g.format]->pack : range.products->pack;
        pack_panel(to + (u * g.count + q) * L, strip_panels * g.count, m, depth, (s * strip + u) * L, width);
      }
  }

  // Packs the thread's own strips. If threads split the rows, each packs an equal part of the strips.
  void pack(const ThreadRange& range) const {
    const int64_t begin = strips * range.id / range.count, end = strips * (range.id + 1) / range.count;
    for (int64_t s = begin; s < end; s++)
      for (int g = 0; g < ALL; g++)
        pack_strip(range, groups[g], groups[g].packed + s * strip * groups[g].count * groups[g].lines * L, 0,
                   groups[g].depth, s);
  }

  V* sums_of(const Group& g, int64_t s, int64_t row_count) const {
    return g.sums + (s - first) * strip * g.count * row_count;
  }

  // Computes the sums of a strip for few rows without packing its matrices, if each has lines in memory.
  bool sum_directly(const ThreadRange& range, const Group& g, int64_t s, const T* x, int64_t row_count, V* sums) const {
    MatrixPanel read[MAX_STRIP];
    const int count = panels_of(s) * g.count;
    for (int p = 0; p < count; p++) {
      const int64_t column = (s * strip + p / g.count) * L;
      const Matrix& m = g.matrix[p % g.count];
      if (m.k != 1 && m.n != 1) return false;
      read[p] = {{m.data + column * m.n, m.k, m.n}, width - column};
    }
    if (row_count) range.products->direct[row_count - 1](x, g.depth, 1, read, count, g.depth, false, sums);
    return true;
  }

  // Computes the sums of a strip for `row_count` prepared rows into the group's own memory, which has `stored_rows` per
  // strip.
  void sum(const ThreadRange& range, const Group& g, int64_t s, const T* x, int64_t row_count,
           int64_t stored_rows) const {
    const int row_sums = panels_of(s) * g.count;
    const int max_rows = rows_of(row_sums);
    const int64_t tiles = (row_count + max_rows - 1) / max_rows;
    V* const sums = sums_of(g, s, stored_rows);
    if (range.pack_per_step && row_count <= MAX_DIRECT_ROWS && sum_directly(range, g, s, x, row_count, sums)) return;
    alignas(64) T block[PACKED_TERMS * MAX_STRIP * L];
    const int64_t step = range.pack_per_step ? PACKED_TERMS : g.depth;
    for (int64_t k = 0; k < g.depth; k += step) {
      const int64_t terms = std::min(step, g.depth - k);
      const T* w = block;
      if (range.pack_per_step)
        pack_strip(range, g, block, k, terms, s);
      else
        w = g.packed + s * strip * g.count * g.lines * L;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = row_count * t / tiles;
        const int tile_rows = (int)(row_count * (t + 1) / tiles - row);
        g.tile(*range.products, tile_rows, row_sums)(x + row * g.stride + k, g.stride, 1, w, terms, k > 0,
                                                     sums + row * row_sums);
      }
    }
  }

  // Computes the hoisted sums of `row_count` rows, of one step or several, from row `begin` of all time steps on.
  void hoist(const ThreadRange& range, int64_t begin, int64_t row_count, int64_t block_rows) const {
    const T* rows_of_group[M ? M : 1];
    for (int m = 0; m < M; m++) {
      const Group& g = groups[N + m];
      rows_of_group[m] = g.prepare(*range.products, g.row + begin * g.depth, row_count);
    }
    for (int64_t s = first; s < last; s++)
      for (int m = 0; m < M; m++) sum(range, groups[N + m], s, rows_of_group[m], row_count, block_rows);
  }

  // Fills in the hoisted sums of a strip, from row `row` of the block on.
  void set_hoisted(const V** hoisted, int64_t k, int64_t row, int64_t block_rows) const {
    for (int m = 0; m < M; m++)
      hoisted[m] = sums_of(groups[N + m], k, block_rows) + row * panels_of(k) * groups[N + m].count;
  }

  // Runs a step. Its rows begin `shift` rows after the first hoisted row. x: for each group the row that it reads.
  template <class Step, class Compute>
  NEVER_INLINE void sweep(const Step& s, const ThreadRange& range, const T* const* x, int64_t shift,
                          int64_t block_rows, Compute compute) const {
    const int64_t to = std::min(range.to, s.rows), row_count = to - range.from, tiles = (row_count + rows - 1) / rows;
    if (row_count <= 0) return;
    V sums[(N ? N : 1) * TILE_SUMS];
    const V* hoisted[M ? M : 1];
    const T* from[N ? N : 1];  // the rows of each group
    for (int g = 0; g < N; g++)
      from[g] = groups[g].prepare(*range.products, x[g] + range.from * groups[g].depth, row_count);
    for (int64_t j = first; j < last; j++) {
      const int64_t k = s.descending ? last - 1 - (j - first) : j;  // what was read last is still in the cache
      const int strip_panels = panels_of(k);
      if (range.pack_per_step)
        for (int g = 0; g < N; g++)
          sum(range, groups[g], k, from[g], row_count, range.batch);
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
            group.tile(*range.products, tile_rows, row_sums)(
                from[g] + row * group.stride, group.stride, 1,
                group.packed + k * strip * group.count * group.lines * L, group.depth, false, at);
          at += tile_rows * row_sums;
        }
        set_hoisted(hoisted, k, shift + row, block_rows);
        compute(s, Tile{range.from + row, k * strip, width, tile_rows, strip_panels, sums, hoisted});
      }
    }
  }
};

// Where a group finds the row that it reads: the k-th array of a kind.
template <auto ARRAYS, int K> struct Reads {
  template <class Step> static const T* row(const Step& s) { return (s.*ARRAYS)[K].data; }
};

// A phase: the function that computes a tile, and what its groups read. M more groups are hoisted.
template <auto COMPUTE, int M, class... Groups> struct Phase : PhasePlan<sizeof...(Groups), M> {
  using Plan = PhasePlan<sizeof...(Groups), M>;

  template <class Step>
  void run(const Step& s, const ThreadRange& range, int64_t shift, int64_t block_rows, int64_t steps) const {
    if constexpr (sizeof...(Groups) == 0) {
      stream(s, range, shift, block_rows, steps);
    } else {
      const T* const x[] = {Groups::row(s)...};
      Plan::sweep(s, range, x, shift, block_rows, COMPUTE);
    }
  }

 private:
  // Runs steps without products, one after another. It goes through rows and panels in memory order.
  template <class Step>
  NEVER_INLINE void stream(const Step& s, const ThreadRange& range, int64_t shift, int64_t block_rows,
                           int64_t steps) const {
    const int64_t rows = std::min(range.to, s.rows) - range.from;
    if (rows <= 0) return;
    const V* hoisted[M ? M : 1];
    for (int64_t k = Plan::first; k < Plan::last; k++) {
      Plan::set_hoisted(hoisted, k, shift, block_rows);
      StreamTile tile{{range.from, k * Plan::strip, Plan::width, (int)rows, Plan::panels_of(k), nullptr, hoisted},
                      0, {s.stride, Plan::width, rows}};
      Step now = s;
      for (int64_t step = 0; step < steps; step++) {
        COMPUTE(now, tile);
        now.advance();
        tile.hoisted_row += s.stride;
      }
    }
  }
};

// The scalars of a level: the class that computes them for a block of rows.
template <class Rows> struct Scalars {
  void set_up(ArgumentReader&, const Call&, const ThreadRange&, Arena&, Arena&) {}
  void pack(const ThreadRange&) const {}
  void hoist(const ThreadRange&, int64_t, int64_t, int64_t) const {}

  template <class Step> void run(const Step& s, const ThreadRange& range, int64_t, int64_t, int64_t) const {
    const bool stores = range.by_rows() || range.id == 0;
    const int64_t to = std::min(range.to, s.rows);
    int64_t row = range.from;
    for (; row + SCALAR_ROWS <= to; row += SCALAR_ROWS) Rows::compute(s, RowBlock<SCALAR_ROWS>{row, stores});
    for (; row < to; row++) Rows::compute(s, RowBlock<1>{row, stores});
  }
};

// Waits until all threads have stored what the next phases read.
struct Barrier {
  void set_up(ArgumentReader&, const Call&, const ThreadRange&, Arena&, Arena&) {}
  void pack(const ThreadRange&) const {}
  void hoist(const ThreadRange&, int64_t, int64_t, int64_t) const {}
  template <class Step> void run(const Step&, const ThreadRange& range, int64_t, int64_t, int64_t) const {
    range.synchronize();
  }
};
