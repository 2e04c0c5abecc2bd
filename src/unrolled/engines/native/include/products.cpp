#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace {

template <int R, int S>
void tile(const T* x, long row, long step, const T* w, long depth, bool more, V* sums) {
  for (long from = 0; from < depth; from += BLOCK) {
    V g[R][S] = {};
    const T* const end = w + std::min<long>(depth - from, BLOCK) * S * L;
    for (; w < end; w += S * L, x += step) {
      V m[S];
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) m[s] = load(w + s * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const V scale = splat(x[r * row]);
#pragma GCC unroll 16
        for (int s = 0; s < S; s++) g[r][s] = fma(m[s], scale, g[r][s]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) sums[r * S + s] = more ? sums[r * S + s] + g[r][s] : g[r][s];
    more = true;
  }
}

using Tile = void (*)(const T*, long, long, const T*, long, bool, V*);

template <int S, int... R> constexpr Tile row_tile(int rows, std::integer_sequence<int, R...>) {
  constexpr Tile tiles[] = {tile<R + 1, S>...};
  return tiles[rows - 1];
}

template <int... S> Tile tile_of(int rows, int strip, std::integer_sequence<int, S...>) {
  Tile found = nullptr;
  ((strip == S + 1 ? (void)(found = row_tile<S + 1>(rows, std::make_integer_sequence<int, rows_of(S + 1)>())) : (void)0), ...);
  return found;
}

void any_tile(int rows, int strip, const T* x, long row, long step, const T* w, long depth, bool more, V* sums) {
  tile_of(rows, strip, std::make_integer_sequence<int, STRIP>())(x, row, step, w, depth, more, sums);
}

// Rows of L elements become columns.
template <int D, int... J> inline void exchange(V& a, V& b, std::integer_sequence<int, J...>) {
  const V x = __builtin_shufflevector(a, b, ((J & D) ? L + J - D : J)...);
  b = __builtin_shufflevector(a, b, ((J & D) ? L + J : J + D)...);
  a = x;
}

template <int D> inline void transpose(V* v) {
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & D)) exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, L>());
    transpose<D / 2>(v);
  }
}

void pack(T* to, int strip, Matrix matrix, long depth, long column, long width) {
  const long many = std::clamp<long>(width - column, 0, L), line = (long)strip * L;
  const T* from = matrix.from + column * matrix.n;
  long k = 0;
  if (matrix.n == 1) {
    for (; k < depth; k++) store(to + k * line, load(from + k * matrix.k, many));
  } else if (matrix.k == 1) {
    for (; k < depth; k += L) {
      const long deep = std::min<long>(depth - k, L);
      V v[L];
      for (int j = 0; j < L; j++) v[j] = j < many ? load(from + j * matrix.n + k, deep) : V{};
      transpose<L / 2>(v);
      for (int j = 0; j < deep; j++) store(to + (k + j) * line, v[j]);
    }
  } else {
    for (; k < depth; k++)
      for (long j = 0; j < L; j++) to[k * line + j] = j < many ? from[j * matrix.n + k * matrix.k] : T(0);
  }
}

// A product over many rows: C = start + A B, a strip of BLOCK x 4 panels of B at a time.
struct Whole {
  T* to;              // (rows, width), its rows next to one another
  const T* start;     // (width), or nothing
  Matrix left, right; // left: k is its row
  long rows, width, depth;
  T* packed;          // room for a block of right
  Meeting meeting;
};

constexpr int WIDE = 4;            // panels of a strip
constexpr long DEEP = 4 * BLOCK;   // of k at once: a packed block of 1024 columns is 1 MiB in float32
constexpr long COLUMNS = 1024;

void add(const Whole& w, const T* x, long row, long step, long at, int rows, long column, int strip, const T* packed,
         long from, long deep, V* sums) {
  const long n = w.width - column;
  for (int r = 0; r < rows; r++)
    for (int s = 0; s < strip; s++)
      sums[r * strip + s] = from      ? load(w.to + (at + r) * w.width + column + s * L, n - s * L)
                            : w.start ? load(w.start + column + s * L, n - s * L)
                                      : V{};
  any_tile(rows, strip, x, row, step, packed, deep, true, sums);
  for (int r = 0; r < rows; r++)
    for (int s = 0; s < strip; s++)
      store(w.to + (at + r) * w.width + column + s * L, sums[r * strip + s], n - s * L);
}

// Few rows: each thread packs its own columns, a block of k at a time.
void few_rows(Whole& w, int id, int count) {
  const long strips = (w.width + WIDE * L - 1) / (WIDE * L);
  alignas(64) T packed[BLOCK * WIDE * L];
  V sums[MOST * WIDE];
  for (long strip = strips * id / count; strip < strips * (id + 1) / count; strip++) {
    const long column = strip * WIDE * L;
    const int panels = (int)std::min<long>(WIDE, (w.width - column + L - 1) / L);
    for (long from = 0; from < w.depth; from += BLOCK) {
      const long deep = std::min<long>(BLOCK, w.depth - from);
      const Matrix block{w.right.from + from * w.right.k, w.right.k, w.right.n};
      for (int s = 0; s < panels; s++) pack(packed + s * L, panels, block, deep, column + s * L, w.width);
      const int most = rows_of(WIDE);
      for (long at = 0; at < w.rows; at += most) {
        const int rows = (int)std::min<long>(most, w.rows - at);
        const T* x = w.left.from + at * w.left.n + from * w.left.k;
        add(w, x, w.left.n, w.left.k, at, rows, column, panels, packed, from, deep, sums);
      }
    }
  }
}

void many_rows(Whole& w, int id, int count) {
  constexpr int most = rows_of(WIDE);
  alignas(64) T rows_packed[DEEP * most + L];
  V sums[MOST * WIDE];
  const long tiles = (w.rows + most - 1) / most;
  for (long left = 0; left < w.width; left += COLUMNS) {
    const long columns = std::min<long>(COLUMNS, w.width - left), strips = (columns + WIDE * L - 1) / (WIDE * L);
    for (long from = 0; from < w.depth; from += DEEP) {
      const long deep = std::min<long>(DEEP, w.depth - from);
      const Matrix block{w.right.from + from * w.right.k, w.right.k, w.right.n};
      const auto panels_of = [&](long strip) {
        return (int)std::min<long>(WIDE, (w.width - left - strip * WIDE * L + L - 1) / L);
      };
      for (long strip = strips * id / count; strip < strips * (id + 1) / count; strip++)
        for (int s = 0, panels = panels_of(strip); s < panels; s++)
          pack(w.packed + strip * WIDE * L * deep + s * L, panels, block, deep, left + (strip * WIDE + s) * L, w.width);
      w.meeting.wait(count);
      for (long t = tiles * id / count; t < tiles * (id + 1) / count; t++) {
        const long at = t * most;
        const int rows = (int)std::min<long>(most, w.rows - at);
        const T* x = w.left.from + at * w.left.n + from * w.left.k;
        long row = w.left.n, step = w.left.k;
        if (step != 1) {  // rows next to one another for each k
          const bool side_by_side = row == 1 && at + L <= w.rows;
          for (long k = 0; k < deep; k++)
            if (side_by_side) store(rows_packed + k * most, load(x + k * step));
            else
              for (int r = 0; r < rows; r++) rows_packed[k * most + r] = x[r * row + k * step];
          x = rows_packed, row = 1, step = most;
        }
        for (long strip = 0; strip < strips; strip++)
          add(w, x, row, step, at, rows, left + strip * WIDE * L, panels_of(strip), w.packed + strip * WIDE * L * deep,
              from, deep, sums);
      }
      w.meeting.wait(count);
    }
  }
}

}  // namespace

extern "C" int lanes() { return L; }

extern "C" void products(Products* out, TeamRun team) { *out = {team, any_tile, pack}; }

// C (rows, width) = start + left (rows, depth) @ right (depth, width); strides in elements.
extern "C" int whole_product(T* to, const T* start, const T* left, long left_row, long left_k, const T* right,
                             long right_k, long right_n, long rows, long width, long depth, int threads,
                             TeamRun team) {
  Whole w{to, start, {left, left_k, left_row}, {right, right_k, right_n}, rows, width, depth, nullptr, {}};
  if (depth == 0 || rows == 0 || width == 0) return 0;
  if (rows <= 2 * MOST) {
    team(threads, [](void* what, int id, int count) { few_rows(*(Whole*)what, id, count); }, &w);
    return 0;
  }
  const long columns = (std::min(width, COLUMNS) + WIDE * L - 1) / (WIDE * L) * WIDE * L;
  w.packed = (T*)std::aligned_alloc(64, std::min(depth, DEEP) * columns * sizeof(T));
  if (!w.packed) return 1;
  team(threads, [](void* what, int id, int count) { many_rows(*(Whole*)what, id, count); }, &w);
  std::free(w.packed);
  return 0;
}
