#include "products.h"

#include <algorithm>
#include <utility>

namespace {

template <int R, int S>
void tile(const T* x, long row, long step, const T* w, long depth, bool more, V* sums) {
  // beside the sums the panels, and but for AVX-512 a register for what they are multiplied by
  constexpr bool fits = R > 1 && R * S + S + (BYTES < 64) <= REGISTERS;
  for (long from = 0; from < depth; from += BLOCK) {
    V g[R][S] = {};
    const T* const end = w + std::min<long>(depth - from, BLOCK) * S * L;
    for (; w < end; w += S * L, x += step) {
      V m[S];
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) m[s] = fits ? kept(load(w + s * L)) : load(w + s * L);
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

template <int S, int... R> void fill_rows(Products& out, std::integer_sequence<int, R...>) {
  ((out.tiles[R][S - 1] = tile<R + 1, S>), ...);
}

template <int... S> void fill(Products& out, std::integer_sequence<int, S...>) {
  (fill_rows<S + 1>(out, std::make_integer_sequence<int, rows_of(S + 1)>()), ...);
}

Products table{};

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

// A product over many rows, C = A B or C += A B, a strip of panels of B at a time.
struct Whole {
  T* to;              // (rows, width), its rows next to one another
  bool more;          // add to what is there
  Matrix left, right; // left: k is its row
  long rows, width, depth;
  T* packed;          // room for a block of right
  Meeting meeting;
};

constexpr int WIDE = 4;           // panels of a strip
constexpr long DEEP = 8 * BLOCK;  // of k at once: a packed block of 1024 columns is 1 MiB in float32
constexpr long COLUMNS = 1024;

void add(const Whole& w, const T* x, long row, long step, long at, int rows, long column, int strip, const T* packed,
         bool more, long deep, V* sums) {
  const long n = w.width - column;
  if (more)
    for (int r = 0; r < rows; r++)
      for (int s = 0; s < strip; s++)
        sums[r * strip + s] = load(w.to + (at + r) * w.width + column + s * L, n - s * L);
  table.tiles[rows - 1][strip - 1](x, row, step, packed, deep, more, sums);
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
        add(w, x, w.left.n, w.left.k, at, rows, column, panels, packed, from || w.more, deep, sums);
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
              from || w.more, deep, sums);
      }
      w.meeting.wait(count);
    }
  }
}

// Sums of each column, in blocks of rows that are added up in order.
struct Sums {
  T* to;
  const T* from;
  long step, rows, width;  // step: from one row to the next
};

void columns_of(Sums& w, int id, int count) {
  const long panels = (w.width + L - 1) / L;
  for (long p = panels * id / count; p < panels * (id + 1) / count; p++) {
    const long n = w.width - p * L;
    V all{};
    for (long block = 0; block < w.rows; block += 4 * BLOCK) {
      V one[4] = {};
      const long end = std::min(block + 4 * BLOCK, w.rows);
      for (long r = block; r < end; r++) one[r & 3] += load(w.from + r * w.step + p * L, n);
      all += (one[0] + one[1]) + (one[2] + one[3]);
    }
    store(w.to + p * L, all, n);
  }
}

}  // namespace

extern "C" int lanes() { return L; }

extern "C" Products* products(TeamRun team, TeamRoom room) {
  table.team = team, table.room = room, table.pack = pack;
  fill(table, std::make_integer_sequence<int, STRIP>());
  return &table;
}

// Work on all time steps at once, one piece after another. Each is eleven numbers: a product's
// to, more, left, its strides, right, its strides, rows, width, depth (strides in elements, along rows or
// columns last); or, where more is 2, sums of columns: to, 2, -, -, -, from, its stride, -, rows, width, -.
extern "C" int at_once(const int64_t* pieces, long many, int threads) {
  for (const int64_t* p = pieces; p < pieces + 11 * many; p += 11) {
    const long rows = p[8], width = p[9], depth = p[10];
    const bool small = (double)rows * width * std::max<long>(depth, 1) < 100000;
    if (p[1] == 2) {
      Sums sums{(T*)p[0], (const T*)p[5], p[6], rows, width};
      table.team(small ? 1 : threads, nullptr, [](void* s, int id, int n) { columns_of(*(Sums*)s, id, n); }, &sums);
      continue;
    }
    Whole w{(T*)p[0], p[1] != 0, {(const T*)p[2], p[4], p[3]}, {(const T*)p[5], p[6], p[7]},
            rows, width, depth, nullptr, {}};
    if (rows == 0 || width == 0) continue;
    if (depth == 0) {
      if (!w.more) std::memset(w.to, 0, rows * width * sizeof(T));
      continue;
    }
    void (*run)(void*, int, int) = [](void* what, int id, int n) { few_rows(*(Whole*)what, id, n); };
    if (rows > 2 * MOST) {
      const long columns = (std::min(width, COLUMNS) + WIDE * L - 1) / (WIDE * L) * WIDE * L;
      w.packed = (T*)table.room(std::min(depth, DEEP) * columns * sizeof(T));
      if (!w.packed) return 1;
      run = [](void* what, int id, int n) { many_rows(*(Whole*)what, id, n); };
    }
    table.team(small ? 1 : threads, nullptr, run, &w);
  }
  return 0;
}
