// Scalars: one number per row, computed from the values of the row or reduced from its columns.
#pragma once
#include "step.h"

// Loops over the R rows that are computed side by side.
#define FOR_ROWS _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)

// The reductions: how two values are combined, and the neutral element.
struct Sum {
  static V neutral() { return V{}; }
  static V combine(V a, V b) { return a + b; }
};
struct Product {
  static V neutral() { return splat(1); }
  static V combine(V a, V b) { return a * b; }
};
struct Maximum {
  static V neutral() { return splat(-INFINITY); }
  static V combine(V a, V b) { return maximum(a, b); }
};
struct Minimum {
  static V neutral() { return splat(INFINITY); }
  static V combine(V a, V b) { return minimum(a, b); }
};

// R rows, from `first` on. Computing several rows at once hides the latency of the additions.
template <int R> struct RowBlock {
  int64_t first;
  bool stores;  // whether this thread stores what others read

  // Computes a number per row; compute(panel) returns it as the first lane.
  template <class F> ALWAYS_INLINE void single(const Column& to, F compute) const {
    FOR_ROWS to.data[first + r] = compute(Panel{first + r, 0, 1, 0, 0})[0];
  }

  // Reduces the columns compute(panel) of each row, in order.
  template <class Reduction, class F>
  ALWAYS_INLINE void reduce(Reduction, const Column& to, int64_t width, F compute) const {
    V all[R];
    FOR_ROWS all[r] = Reduction::neutral();
    for (int64_t i = 0; i < width; i += L) {
      const int64_t n = width - i;
      FOR_ROWS {
        const V value = first_lanes(n, compute(Panel{first + r, i, n, 0, 0}), Reduction::neutral());
        all[r] = Reduction::combine(all[r], value);
      }
    }
    T one[R];
    FOR_ROWS one[r] = all[r][0];
    for (int j = 1; j < L; j++)
      FOR_ROWS one[r] = Reduction::combine(splat(one[r]), splat(all[r][j]))[0];
    FOR_ROWS to.data[first + r] = one[r];
  }

  void store(const Array& x, const Column& scalar) const {
    if (stores) FOR_ROWS x.data[(first + r) * x.width] = scalar.data[first + r];
  }
};
