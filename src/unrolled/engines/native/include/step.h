// What the generated functions see of a step: its values, the tile of rows and panels to compute, and a panel of it.
#pragma once
#include "thread_range.h"

// Values of several rows. All rows share the same values if the width is 0.
struct Array {
  T* data;
  int64_t width;  // distance from one row to the next

  Array operator+(int64_t columns) const { return {data + columns, width}; }
};

// Values that all rows share.
struct Row {
  const T* data;

  Row(const Array& array) : data(array.data) {}
};

// One number per row.
struct Column {
  T* data;
};

// The values of a step, each from its first row on.
template <int INPUTS, int STATES, int SAVED, int SCRATCH, int SCALARS> struct StepValues {
  static constexpr int inputs = INPUTS, states = STATES, saves = SAVED, buffers = SCRATCH, scalars = SCALARS;
  Array in[INPUTS + 1], old[STATES + 1], next[STATES + 1], saved[SAVED + 1], scratch[SCRATCH + 1];
  T* other[STATES + 1];    // where the next step stores its states, if each buffer holds one step; else null
  Column scalar[SCALARS + 1];
  const int64_t* sizes;    // first columns and widths that the functions read
  int64_t rows, stride;    // stride: distance in rows from the values of one step to those of the next
  bool descending;         // go through the strips from the last to the first

  // Goes on to the next step of the same block.
  void advance() {
    for (int k = 0; k < INPUTS; k++) in[k].data += stride * in[k].width;
    for (int k = 0; k < SAVED; k++) saved[k].data += stride * saved[k].width;
    for (int k = 0; k < SCRATCH; k++) scratch[k].data += stride * scratch[k].width;
    for (int k = 0; k < STATES; k++) {
      old[k] = next[k];
      next[k].data = other[k] ? other[k] : next[k].data + stride * next[k].width;
      if (other[k]) other[k] = old[k].data;
    }
  }
};

// The sums of a group of products, as (row, panel, product).
struct Sums {
  const V* data;
  int count;
};

// Distance in rows from a row to the one to prefetch, in a pass over `rows` rows of each step.
struct PrefetchDistance {
  int64_t rows, stride, steps, more;

  PrefetchDistance(int64_t stride, int64_t width, int64_t rows) : rows(rows), stride(stride) {
    const int64_t distance = 1 + PREFETCH_ELEMENTS / width;
    steps = distance / rows, more = distance % rows;
  }

  int64_t from(int64_t row) const {
    return row + more < rows ? steps * stride + more : (steps + 1) * stride + more - rows;
  }
};

// A panel of a row: columns `column` .. `column` + L, of which the first n exist.
struct Panel {
  int64_t row, column, n;
  int64_t sum, ahead;  // index of its sums, and distance to the row to prefetch

  V load(const Array& x) const { return ::load(x.data + row * x.width + column, n); }
  V load(const Row& x) const { return ::load(x.data + column, n); }
  V load_ahead(const Array& x) const {
    __builtin_prefetch(x.data + (row + ahead) * x.width + column);
    return load(x);
  }
  V broadcast(const Array& x) const { return splat(x.data[row * x.width]); }
  V broadcast(const Row& x) const { return splat(x.data[0]); }
  V scalar(const Column& x) const { return splat(x.data[row]); }
  V get(const Sums& x, int product) const { return x.data[sum * x.count + product]; }
  void store(const Array& x, V value) const { ::store(x.data + row * x.width + column, value, n); }
};

// The rows and panels that a call of a function computes.
struct Tile {
  int64_t row, panel, width;
  int rows, panels;
  const V* sums;            // of the groups of the phase, one after another
  const V* const* hoisted;  // of each hoisted group

  // The sums of a group, after those of `preceding` products in other groups.
  Sums products(int preceding, int count) const { return {sums + preceding * rows * panels, count}; }
  Sums hoisted_products(int group, int count) const { return {hoisted[group], count}; }

  Panel at(int r, int u) const {
    const int64_t column = (panel + u) * L;
    return {row + r, column, width - column, (int64_t)r * panels + u, 0};
  }
};

// The same in a phase without products, which may run several steps, one after another.
struct StreamTile : Tile {
  int64_t hoisted_row;  // the row of the hoisted sums that belongs to the first row of the tile
  PrefetchDistance prefetch;

  Sums hoisted_products(int group, int count) const { return {hoisted[group] + hoisted_row * panels * count, count}; }

  Panel at(int r, int u) const {
    Panel p = Tile::at(r, u);
    p.ahead = prefetch.from(r);
    return p;
  }
};

// Loops over the panels of a tile: columns by columns, or in memory order.
#define FOR_PANELS(p, tile)                  \
  for (int u = 0; u < (tile).panels; u++)    \
    for (int r = 0; r < (tile).rows; r++)    \
      if (const Panel p = (tile).at(r, u); true)
#define FOR_ROWS_OF_PANELS(p, tile)          \
  for (int r = 0; r < (tile).rows; r++)      \
    for (int u = 0; u < (tile).panels; u++)  \
      if (const Panel p = (tile).at(r, u); true)
