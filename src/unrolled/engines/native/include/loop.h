// What every generated loop stands on: how its work is shared, and a pass over the panels of a phase.
#pragma once
#include <algorithm>

#include "functions.h"
#include "products.h"

// The first numbers of a call; the widths, offsets and strides that the generated source reads follow.
enum { STEPS, ROWS, BACK, THREADS, DIRECT, BY_ROWS, SIZES };

struct Call {
  const int64_t* D;
  void* const* P;
  const Products* products;
  Meeting meeting;
};

// What one thread does of a step: some rows, or some of the panels of each phase.
struct Share {
  const Products* products;
  Meeting* meeting;
  int id, count;
  long few, from, to;  // the rows of a step; its own
  bool direct, by_rows;

  void meet() const {
    if (!by_rows) meeting->wait(count);
  }
};

// Products that read the same row: sums of `count` panels for each panel of the phase.
struct Group {
  int count;
  long depth;
  T* packed;
  Matrix matrix[STRIP];
};

static inline Share share(Call& c, int id, int count) {
  const long rows = c.D[ROWS];
  const bool by_rows = c.D[BY_ROWS] && count > 1;
  return {c.products, &c.meeting, id, count, rows, by_rows ? rows * id / count : 0,
          by_rows ? rows * (id + 1) / count : rows, c.D[DIRECT] != 0, by_rows};
}

// How a phase is cut: panels of a strip, and rows of a tile.
struct Cut {
  long panels, strips;
  int strip, rows;
};

static inline Cut cut(const Share& h, long width, const Group* const* groups, int n) {
  Cut c{(width + L - 1) / L, 0, n ? STRIP : 4, MOST};
  const int target = h.few <= 3 ? STRIP : 4;
  for (int g = 0; g < n; g++) c.strip = std::min(c.strip, std::max(1, target / groups[g]->count));
  c.strip = (int)std::min<long>(c.strip, (c.panels + h.count - 1) / h.count);
  for (int g = 0; g < n; g++) c.rows = std::min(c.rows, rows_of(c.strip * groups[g]->count));
  c.strips = (c.panels + c.strip - 1) / c.strip;
  return c;
}

static inline int panels_of(const Cut& c, long strip) {
  return (int)std::min<long>(c.strip, c.panels - strip * c.strip);
}

static inline void pack_strip(const Share& h, const Group& g, T* to, long from, long depth, long panel, int panels,
                              long width) {
  for (int u = 0; u < panels; u++)
    for (int q = 0; q < g.count; q++) {
      Matrix m = g.matrix[q];
      m.from += from * m.k;
      h.products->pack(to + (u * g.count + q) * L, panels * g.count, m, depth, (panel + u) * L, width);
    }
}

// Each thread packs its own strips; the whole of them where the rows are shared.
static inline void pack(const Share& h, long width, const Group* const* groups, int n) {
  const Cut c = cut(h, width, groups, n);
  for (long s = c.strips * h.id / h.count; s < c.strips * (h.id + 1) / h.count; s++)
    for (int g = 0; g < n; g++)
      pack_strip(h, *groups[g], groups[g]->packed + s * c.strip * groups[g]->count * groups[g]->depth * L, 0,
                 groups[g]->depth, s * c.strip, panels_of(c, s), width);
}

// The work on the panels of a phase: sums are those of its groups, each (rows, panels, count).
template <class Step>
using Point = void (*)(const Step& s, long row, int rows, long panel, int panels, const V* sums);

template <class Step, int N>
static inline void sweep(const Step& s, const Share& h, long width, const Group* const* groups,
                         const T* const* x, Point<Step> point) {
  const Cut c = cut(h, width, groups, N);
  const long first = h.by_rows ? 0 : c.strips * h.id / h.count;
  const long last = h.by_rows ? c.strips : c.strips * (h.id + 1) / h.count;
  const long to = std::min(h.to, s.rows), rows = to - h.from, tiles = (rows + c.rows - 1) / c.rows;
  if (rows <= 0) return;
  V sums[(N ? N : 1) * SUMS];
  alignas(64) T block[N ? BLOCK * STRIP * L : 1];
  for (long strip = first; strip < last; strip++) {
    const int panels = panels_of(c, strip);
    for (long t = 0; t < tiles; t++) {
      const long row = h.from + rows * t / tiles;
      const int many = (int)(h.from + rows * (t + 1) / tiles - row);
      V* at = sums;
      for (int g = 0; g < N; g++) {
        const Group& group = *groups[g];
        const int wide = panels * group.count;
        const T* from = x[g] + row * group.depth;
        if (h.direct) {
          for (long k = 0; k < group.depth; k += BLOCK) {
            const long deep = std::min<long>(BLOCK, group.depth - k);
            pack_strip(h, group, block, k, deep, strip * c.strip, panels, width);
            h.products->tile(many, wide, from + k, group.depth, 1, block, deep, k > 0, at);
          }
        } else {
          const T* w = group.packed + strip * c.strip * group.count * group.depth * L;
          h.products->tile(many, wide, from, group.depth, 1, w, group.depth, false, at);
        }
        at += many * wide;
      }
      point(s, row, many, strip * c.strip, panels, sums);
    }
  }
}

// Where a state lies before a step; rows that begin with this step come from the initial state.
static inline const T* before(const Share& h, const T* initial, const T* last, T* grown, long width, long rows,
                              long rows_last) {
  if (rows_last == 0) return initial;
  if (rows_last >= rows) return last;
  const long from = h.by_rows ? h.from : rows * h.id / h.count;
  const long to = h.by_rows ? std::min(h.to, rows) : rows * (h.id + 1) / h.count;
  for (long r = from; r < to; r++)
    std::memcpy(grown + r * width, (r < rows_last ? last : initial) + r * width, width * sizeof(T));
  return grown;
}
