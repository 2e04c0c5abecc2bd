// A pass over the panels of a phase: the products that it sums up, and the work that consumes them.
#pragma once
#include "share.h"

// For each of the R rows that are computed side by side.
#define EACH _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)

// Products that read the same row: sums of `count` panels for each panel of the phase.
struct Group {
  int count;
  long depth;
  T* packed;
  Matrix matrix[STRIP];
  V* sums;  // of its rows for the thread's own strips: (strip, row, panel, place)
};

// The work on the panels of a phase, of rows that begin with `row` and panels that begin with `panel`. The
// sums of its groups are (row, panel, place) of each group. It may do several steps, one after another.
template <class Step>
using Point = void (*)(const Step& s, long row, int rows, long panel, int panels, const V* sums,
                       const V* const* hoisted, long steps);

// How the work of a phase is cut, for one thread: its strips of panels, and what it sums up.
// N groups are summed up in every step, M for many steps at once: they read what is known before the loop.
template <int N, int M> struct Phase {
  long width, panels, strips, first, last;
  int strip, rows;
  Group groups[N + M ? N + M : 1];

  static constexpr int ALL = N + M;

  // Among the threads that are wanted, not those that came: packed matrices are kept from call to call.
  void cut(const Share& h, long threads, long columns) {
    width = columns;
    panels = (width + L - 1) / L;
    strip = ALL ? STRIP : (int)std::max<long>(1, panels);
    rows = MOST;
    const int target = h.few <= 3 ? STRIP : 4;
    for (int g = 0; g < ALL; g++) strip = std::min(strip, std::max(1, target / groups[g].count));
    strip = (int)std::min<long>(strip, (panels + threads - 1) / threads);
    for (int g = 0; g < ALL; g++) rows = std::min(rows, rows_of(strip * groups[g].count));
    strips = (panels + strip - 1) / strip;
    first = h.all_panels() ? 0 : strips * h.id / h.count;
    last = h.all_panels() ? strips : strips * (h.id + 1) / h.count;
  }

  int panels_of(long s) const { return (int)std::min<long>(strip, panels - s * strip); }

  // The memory of the packed matrices, that all threads share.
  void share_room(Room& room, bool direct, T* const* kept) {
    for (int g = 0; g < ALL; g++)
      groups[g].packed = direct ? nullptr
                         : kept[g] ? kept[g]
                                   : room.take<T>(panels * groups[g].count * groups[g].depth * L);
  }

  // The memory of the sums, each thread's own.
  void own_room(Room& room, long hoisted_rows, long few, bool direct) {
    for (int g = 0; g < ALL; g++) {
      const long many = g >= N ? hoisted_rows : direct ? few : 0;
      groups[g].sums = room.take<V>((last - first) * strip * groups[g].count * many);
    }
  }

  void pack_strip(const Share& h, const Group& g, T* to, long from, long depth, long s) const {
    const int many = panels_of(s);
    for (int u = 0; u < many; u++)
      for (int q = 0; q < g.count; q++) {
        Matrix m = g.matrix[q];
        m.from += from * m.k;
        h.products->pack(to + (u * g.count + q) * L, many * g.count, m, depth, (s * strip + u) * L, width);
      }
  }

  // Each thread packs its own strips; a share of them where the rows are shared.
  void pack(const Share& h) const {
    const long begin = strips * h.id / h.count, end = strips * (h.id + 1) / h.count;
    for (long s = begin; s < end; s++)
      for (int g = 0; g < ALL; g++)
        pack_strip(h, groups[g], groups[g].packed + s * strip * groups[g].count * groups[g].depth * L, 0,
                   groups[g].depth, s);
  }

  V* sums_of(const Group& g, long s, long many) const { return g.sums + (s - first) * strip * g.count * many; }

  // The sums of a strip for `many` rows, kept in the group's own memory.
  void sum(const Share& h, const Group& g, long s, const T* x, long many, long room_rows) const {
    const int wide = panels_of(s) * g.count;
    const int most = rows_of(wide);
    const long tiles = (many + most - 1) / most;
    V* const sums = sums_of(g, s, room_rows);
    alignas(64) T block[BLOCK * STRIP * L];
    const long step = h.direct ? BLOCK : g.depth;
    for (long k = 0; k < g.depth; k += step) {
      const long deep = std::min(step, g.depth - k);
      const T* w = block;
      if (h.direct)
        pack_strip(h, g, block, k, deep, s);
      else
        w = g.packed + s * strip * g.count * g.depth * L;
      for (long t = 0; t < tiles; t++) {
        const long row = many * t / tiles;
        const int deal = (int)(many * (t + 1) / tiles - row);
        h.products->tiles[deal - 1][wide - 1](x + row * g.depth + k, g.depth, 1, w, deep, k > 0, sums + row * wide);
      }
    }
  }

  // What is known before the loop: `many` rows, of one step or several.
  void hoist(const Share& h, const T* const* x, long many, long room_rows) const {
    for (long s = first; s < last; s++)
      for (int m = N; m < ALL; m++) sum(h, groups[m], s, x[m], many, room_rows);
  }

  // Steps without products: rows and panels in the order in which they lie in memory.
  template <class Step>
  void stream(const Step& s, const Share& h, long shift, long room_rows, long steps, Point<Step> point) const {
    const long many = std::min(h.to, s.rows) - h.from;
    if (many <= 0) return;
    const V* hoisted[M ? M : 1];
    for (long k = first; k < last; k++) {
      const int wide = panels_of(k);
      for (int m = 0; m < M; m++)
        hoisted[m] = sums_of(groups[N + m], k, room_rows) + shift * wide * groups[N + m].count;
      point(s, h.from, (int)many, k * strip, wide, nullptr, hoisted, steps);
    }
  }

  // One step: the rows of this thread begin `shift` rows after the first that was hoisted.
  template <class Step>
  void sweep(const Step& s, const Share& h, const T* const* x, long shift, long room_rows, long steps,
             Point<Step> point) const {
    if constexpr (N == 0) return stream(s, h, shift, room_rows, steps, point);
    const long to = std::min(h.to, s.rows), many = to - h.from, tiles = (many + rows - 1) / rows;
    if (many <= 0) return;
    V here[(N ? N : 1) * SUMS];
    const V* hoisted[M ? M : 1];
    for (long j = first; j < last; j++) {
      const long k = s.turned ? last - 1 - (j - first) : j;  // what was read last is still in the cache
      const int wide = panels_of(k);
      if (h.direct)
        for (int g = 0; g < N; g++) sum(h, groups[g], k, x[g] + h.from * groups[g].depth, many, h.few);
      for (long t = 0; t < tiles; t++) {
        const long row = many * t / tiles;
        const int deal = (int)(many * (t + 1) / tiles - row);
        V* at = here;
        for (int g = 0; g < N; g++) {
          const Group& group = groups[g];
          const int all = wide * group.count;
          if (h.direct)
            std::memcpy(at, sums_of(group, k, h.few) + row * all, deal * all * sizeof(V));
          else
            h.products->tiles[deal - 1][all - 1](x[g] + (h.from + row) * group.depth, group.depth, 1,
                                                 group.packed + k * strip * group.count * group.depth * L,
                                                 group.depth, false, at);
          at += deal * all;
        }
        for (int m = 0; m < M; m++)
          hoisted[m] = sums_of(groups[N + m], k, room_rows) + (shift + row) * wide * groups[N + m].count;
        point(s, h.from + row, deal, k * strip, wide, here, hoisted, 1);
      }
    }
  }
};
