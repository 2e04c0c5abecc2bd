#include "products.h"

#include <algorithm>
#include <utility>

namespace {

template <int R, int S>
void tile(const T* x, int64_t row, int64_t step, const T* w, int64_t depth, bool add, V* sums) {
  // whether the sums, the panels and, except on AVX-512, one factor fit into the registers
  constexpr bool fits = R > 1 && R * S + S + (BYTES < 64) <= REGISTERS;
  for (int64_t from = 0; from < depth; from += BLOCK) {
    V g[R][S] = {};
    const T* const end = w + std::min<int64_t>(depth - from, BLOCK) * S * L;
    for (; w < end; w += S * L, x += step) {
      V m[S];
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) m[s] = fits ? in_register(load(w + s * L)) : load(w + s * L);
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
      for (int s = 0; s < S; s++) sums[r * S + s] = add ? sums[r * S + s] + g[r][s] : g[r][s];
    add = true;
  }
}

template <int S, int... R> void fill_rows(Products& out, std::integer_sequence<int, R...>) {
  ((out.tiles[R][S - 1] = tile<R + 1, S>), ...);
}

template <int... S> void fill(Products& out, std::integer_sequence<int, S...>) {
  (fill_rows<S + 1>(out, std::make_integer_sequence<int, rows_of(S + 1)>()), ...);
}

Products table{};

// One step of transposing L vectors: exchange blocks of D x D elements.
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

// Adds the products of up to L terms from `from` on to the sums of a panel whose columns are lines in memory.
template <int R>
inline void add_transposed(const T* x, int64_t row, int64_t step, const MatrixPanel& panel, int64_t from, int64_t terms,
                           V* g) {
  V v[L];
  const T* at = panel.matrix.data + from;
  if (terms == L && panel.columns >= L) {
#pragma GCC unroll 16
    for (int j = 0; j < L; j++) v[j] = load(at + j * panel.matrix.n);
  } else {
    for (int j = 0; j < L; j++) v[j] = j < panel.columns ? load(at + j * panel.matrix.n, terms) : V{};
  }
  transpose<L / 2>(v);
  if (terms == L) {
#pragma GCC unroll 16
    for (int j = 0; j < L; j++)
      for (int r = 0; r < R; r++) g[r] = fma(v[j], splat(x[r * row + (from + j) * step]), g[r]);
  } else {
    for (int j = 0; j < terms; j++)
      for (int r = 0; r < R; r++) g[r] = fma(v[j], splat(x[r * row + (from + j) * step]), g[r]);
  }
}

// S panels whose columns are lines in memory: L terms of each at a time.
template <int R, int S>
void multiply_lines(const T* x, int64_t row, int64_t step, const MatrixPanel* panels, int64_t depth, bool add, V* sums,
                    int stride) {
  for (int64_t from = 0; from < depth; from += BLOCK) {
    V g[S][R] = {};
    const int64_t end = std::min<int64_t>(from + BLOCK, depth);
    for (int64_t k = from; k < end; k += L)
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) add_transposed<R>(x, row, step, panels[s], k, std::min<int64_t>(L, end - k), g[s]);
    for (int r = 0; r < R; r++)
      for (int s = 0; s < S; s++) {
        V& sum = sums[r * stride + s];
        sum = add ? sum + g[s][r] : g[s][r];
      }
    add = true;
  }
}

// S panels whose rows are lines in memory.
template <int R, int S>
void multiply_rows(const T* x, int64_t row, int64_t step, const MatrixPanel* panels, int64_t depth, bool add, V* sums,
                   int stride) {
  bool whole = true;
  for (int s = 0; s < S; s++) whole &= panels[s].columns >= L;
  for (int64_t from = 0; from < depth; from += BLOCK) {
    V g[R][S] = {};
    const int64_t end = std::min<int64_t>(from + BLOCK, depth);
    for (int64_t k = from; k < end; k++) {
      V m[S];
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        const T* at = panels[s].matrix.data + k * panels[s].matrix.k;
        m[s] = whole ? load(at) : load(at, panels[s].columns);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const V scale = splat(x[r * row + k * step]);
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) g[r][s] = fma(m[s], scale, g[r][s]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int s = 0; s < S; s++) {
        V& sum = sums[r * stride + s];
        sum = add ? sum + g[r][s] : g[r][s];
      }
    add = true;
  }
}

template <int R>
void direct(const T* x, int64_t row, int64_t step, const MatrixPanel* panels, int count, int64_t depth, bool add,
            V* sums) {
  constexpr int LINES = R == 1 ? 2 : 1, ROWS = R == 1 ? 8 : R == 2 ? 4 : 2;
  int s = 0;
  while (s < count) {
    int same = s + 1;  // panels that lie in memory in the same way
    const bool lines = panels[s].matrix.k == 1;
    while (same < count && (panels[same].matrix.k == 1) == lines) same++;
    if (lines) {
      for (; s + LINES <= same; s += LINES)
        multiply_lines<R, LINES>(x, row, step, panels + s, depth, add, sums + s, count);
      for (; s < same; s++) multiply_lines<R, 1>(x, row, step, panels + s, depth, add, sums + s, count);
    } else {
      for (; s + ROWS <= same; s += ROWS)
        multiply_rows<R, ROWS>(x, row, step, panels + s, depth, add, sums + s, count);
      for (; s < same; s++) multiply_rows<R, 1>(x, row, step, panels + s, depth, add, sums + s, count);
    }
  }
}

template <int... R> void fill_direct(Products& out, std::integer_sequence<int, R...>) {
  ((out.direct[R] = direct<R + 1>), ...);
}

void pack(T* to, int strip, Matrix matrix, int64_t depth, int64_t column, int64_t width) {
  const int64_t columns = std::clamp<int64_t>(width - column, 0, L), line = (int64_t)strip * L;
  const T* from = matrix.data + column * matrix.n;
  int64_t k = 0;
  if (matrix.n == 1) {
    for (; k < depth; k++) store(to + k * line, load(from + k * matrix.k, columns));
  } else if (matrix.k == 1) {
    for (; k < depth; k += L) {
      const int64_t terms = std::min<int64_t>(depth - k, L);
      V v[L];
      for (int j = 0; j < L; j++) v[j] = j < columns ? load(from + j * matrix.n + k, terms) : V{};
      transpose<L / 2>(v);
      for (int j = 0; j < terms; j++) store(to + (k + j) * line, v[j]);
    }
  } else {
    for (; k < depth; k++)
      for (int64_t j = 0; j < L; j++) to[k * line + j] = j < columns ? from[j * matrix.n + k * matrix.k] : T(0);
  }
}

// A product of all time steps: C = A B or C += A B, a strip of panels of B at a time.
struct BulkProduct {
  T* to;               // C, contiguous, (rows, width)
  bool add;            // C += A B
  Matrix left, right;  // A, where n is the stride between rows, and B
  int64_t rows, width, depth;
  T* packed;           // memory for a packed block of B
  SpinBarrier barrier;
};

// Computes a tile of C from a packed block of B, or from B itself.
void compute_tile(const BulkProduct& w, const T* x, int64_t row, int64_t step, int64_t at, int rows, int64_t column,
                  int strip, const T* packed, bool add, int64_t terms, V* sums, const Matrix* unpacked = nullptr) {
  const int64_t n = w.width - column;
  if (add)
    for (int r = 0; r < rows; r++)
      for (int s = 0; s < strip; s++)
        sums[r * strip + s] = load(w.to + (at + r) * w.width + column + s * L, n - s * L);
  if (unpacked) {
    MatrixPanel panels[MAX_STRIP];
    for (int s = 0; s < strip; s++)
      panels[s] = {{unpacked->data + (column + s * L) * unpacked->n, unpacked->k, unpacked->n}, n - s * L};
    table.direct[rows - 1](x, row, step, panels, strip, terms, add, sums);
  } else {
    table.tiles[rows - 1][strip - 1](x, row, step, packed, terms, add, sums);
  }
  for (int r = 0; r < rows; r++)
    for (int s = 0; s < strip; s++)
      store(w.to + (at + r) * w.width + column + s * L, sums[r * strip + s], n - s * L);
}

// For few rows: each thread computes its own columns, for a block of BLOCK terms at a time, so that it reads lines of B
// one after another. Very few rows read B from memory, others pack it first.
void multiply_few_rows(BulkProduct& w, int id, int count) {
  const bool reads_directly = w.rows <= MAX_DIRECT_ROWS && w.right.n == 1;
  const int strip = reads_directly ? MAX_STRIP : STRIP, max_rows = reads_directly ? MAX_DIRECT_ROWS : rows_of(STRIP);
  const int64_t strips = (w.width + strip * L - 1) / (strip * L);
  alignas(64) T packed[BLOCK * STRIP * L];
  V sums[std::max(MAX_ROWS * STRIP, MAX_DIRECT_ROWS * MAX_STRIP)];
  for (int64_t from = 0; from < w.depth; from += BLOCK) {
    const int64_t terms = std::min<int64_t>(BLOCK, w.depth - from);
    const Matrix block{w.right.data + from * w.right.k, w.right.k, w.right.n};
    for (int64_t k = strips * id / count; k < strips * (id + 1) / count; k++) {
      const int64_t column = k * strip * L;
      const int panels = (int)std::min<int64_t>(strip, (w.width - column + L - 1) / L);
      if (!reads_directly)
        for (int s = 0; s < panels; s++) pack(packed + s * L, panels, block, terms, column + s * L, w.width);
      for (int64_t at = 0; at < w.rows; at += max_rows) {
        const int rows = (int)std::min<int64_t>(max_rows, w.rows - at);
        const T* x = w.left.data + at * w.left.n + from * w.left.k;
        compute_tile(w, x, w.left.n, w.left.k, at, rows, column, panels, packed, from || w.add, terms, sums,
                     reads_directly ? &block : nullptr);
      }
    }
  }
}

// For many rows and very few terms, as in the gradient of a weight in a short call: each thread writes its own rows.
void multiply_few_terms(BulkProduct& w, int id, int count) {
  for (int64_t r = w.rows * id / count; r < w.rows * (id + 1) / count; r++) {
    V scale[MAX_DIRECT_TERMS];
    for (int64_t k = 0; k < w.depth; k++) scale[k] = splat(w.left.data[r * w.left.n + k * w.left.k]);
    T* const to = w.to + r * w.width;
    for (int64_t column = 0; column < w.width; column += L) {
      const int64_t n = w.width - column;
      V sum{};
      for (int64_t k = 0; k < w.depth; k++) sum = fma(load(w.right.data + k * w.right.k + column, n), scale[k], sum);
      store(to + column, w.add ? load(to + column, n) + sum : sum, n);
    }
  }
}

// For many rows: threads pack a large block of B together, then split the rows.
void multiply_many_rows(BulkProduct& w, int id, int count) {
  constexpr int max_rows = rows_of(STRIP);
  alignas(64) T rows_packed[MAX_DEPTH * max_rows + L];
  V sums[MAX_ROWS * STRIP];
  const int64_t tiles = (w.rows + max_rows - 1) / max_rows;
  for (int64_t left = 0; left < w.width; left += MAX_COLUMNS) {
    const int64_t columns = std::min<int64_t>(MAX_COLUMNS, w.width - left);
    const int64_t strips = (columns + STRIP * L - 1) / (STRIP * L);
    for (int64_t from = 0; from < w.depth; from += MAX_DEPTH) {
      const int64_t terms = std::min<int64_t>(MAX_DEPTH, w.depth - from);
      const Matrix block{w.right.data + from * w.right.k, w.right.k, w.right.n};
      const auto panels_of = [&](int64_t strip) {
        return (int)std::min<int64_t>(STRIP, (w.width - left - strip * STRIP * L + L - 1) / L);
      };
      for (int64_t strip = strips * id / count; strip < strips * (id + 1) / count; strip++)
        for (int s = 0, panels = panels_of(strip); s < panels; s++)
          pack(w.packed + strip * STRIP * L * terms + s * L, panels, block, terms, left + (strip * STRIP + s) * L,
               w.width);
      w.barrier.wait(count);
      for (int64_t t = tiles * id / count; t < tiles * (id + 1) / count; t++) {
        const int64_t at = t * max_rows;
        const int rows = (int)std::min<int64_t>(max_rows, w.rows - at);
        const T* x = w.left.data + at * w.left.n + from * w.left.k;
        int64_t row = w.left.n, step = w.left.k;
        if (step != 1) {  // copy, so that the rows of each k are contiguous
          const bool contiguous = row == 1 && at + L <= w.rows;
          for (int64_t k = 0; k < terms; k++)
            if (contiguous) store(rows_packed + k * max_rows, load(x + k * step));
            else
              for (int r = 0; r < rows; r++) rows_packed[k * max_rows + r] = x[r * row + k * step];
          x = rows_packed, row = 1, step = max_rows;
        }
        for (int64_t strip = 0; strip < strips; strip++)
          compute_tile(w, x, row, step, at, rows, left + strip * STRIP * L, panels_of(strip),
                       w.packed + strip * STRIP * L * terms, from || w.add, terms, sums);
      }
      w.barrier.wait(count);
    }
  }
}

// The sum of each column, in blocks of rows that are added up in order.
struct ColumnSums {
  T* to;
  const T* from;
  int64_t stride, rows, width;  // stride: from one row to the next
};

void sum_columns(ColumnSums& w, int id, int count) {
  const int64_t panels = (w.width + L - 1) / L;
  for (int64_t p = panels * id / count; p < panels * (id + 1) / count; p++) {
    const int64_t n = w.width - p * L;
    V all{};
    for (int64_t block = 0; block < w.rows; block += 4 * BLOCK) {
      V parts[4] = {};
      const int64_t end = std::min(block + 4 * BLOCK, w.rows);
      for (int64_t r = block; r < end; r++) parts[r & 3] += load(w.from + r * w.stride + p * L, n);
      all += (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
    store(w.to + p * L, all, n);
  }
}

}  // namespace

EXPORT int lanes() { return L; }

EXPORT Products* products(RunParallel run, ScratchMemory scratch) {
  table.run = run, table.scratch = scratch, table.pack = pack;
  fill(table, std::make_integer_sequence<int, MAX_STRIP>());
  fill_direct(table, std::make_integer_sequence<int, MAX_DIRECT_ROWS>());
  return &table;
}

EXPORT void set_format(int format, const QuantizedProducts* products) { table.formats[format] = products; }

// Runs operations on all time steps at once, one operation after another. Each one is given as eleven numbers.
// A matrix product: C, add (0 or 1), A, its strides, B, its strides, rows, width, depth. Strides are in elements: those
// of A between rows and between columns, those of B likewise.
// Sums of columns: to, 2, -, -, -, from, the stride between rows, -, rows, width, -.
// Returns 1 if there is not enough memory, else 0.
EXPORT int run_bulk(const int64_t* operations, int64_t count, int threads) {
  for (const int64_t* p = operations; p < operations + 11 * count; p += 11) {
    const int64_t rows = p[8], width = p[9], depth = p[10];
    const bool small = (double)rows * width * std::max<int64_t>(depth, 1) < MIN_BULK_WORK;
    if (p[1] == 2) {
      ColumnSums sums{(T*)p[0], (const T*)p[5], p[6], rows, width};
      const auto run = [](void* s, int id, int n) { sum_columns(*(ColumnSums*)s, id, n); };
      table.run(small ? 1 : threads, nullptr, run, &sums);
      continue;
    }
    BulkProduct w{(T*)p[0], p[1] != 0, {(const T*)p[2], p[4], p[3]}, {(const T*)p[5], p[6], p[7]},
                  rows, width, depth, nullptr, {}};
    if (rows == 0 || width == 0) continue;
    if (depth == 0) {
      if (!w.add) std::memset(w.to, 0, rows * width * sizeof(T));
      continue;
    }
    void (*run)(void*, int, int) = [](void* p, int id, int n) { multiply_few_rows(*(BulkProduct*)p, id, n); };
    if (rows > 2 * MAX_ROWS && depth <= MAX_DIRECT_TERMS && w.right.n == 1) {
      run = [](void* p, int id, int n) { multiply_few_terms(*(BulkProduct*)p, id, n); };
    } else if (rows > 2 * MAX_ROWS) {
      const int64_t columns = (std::min(width, MAX_COLUMNS) + STRIP * L - 1) / (STRIP * L) * STRIP * L;
      w.packed = (T*)table.scratch(std::min(depth, MAX_DEPTH) * columns * sizeof(T));
      if (!w.packed) return 1;
      run = [](void* p, int id, int n) { multiply_many_rows(*(BulkProduct*)p, id, n); };
    }
    table.run(small ? 1 : threads, nullptr, run, &w);
  }
  return 0;
}
