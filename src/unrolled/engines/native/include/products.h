// Matrix products. They are the same for every cell, and compiled once for each dtype (products.cpp).
//
// A matrix is packed in panels of L columns; a strip of S panels is laid out as (k, S, L). Sums run over k in order, in
// blocks of BLOCK terms that are added up in order, too. So an element has the same bits whatever the tile shape, the
// batch size and the number of threads.
#pragma once
#include "thread_pool.h"
#include "tuning.h"
#include "vectors.h"

constexpr int TILE_SUMS = REGISTERS == 32 ? TILE_SUMS_OF_32_REGISTERS : TILE_SUMS_OF_16_REGISTERS;

// Returns how many rows a tile of a strip has.
constexpr int rows_of(int strip) {
  return TILE_SUMS / strip > MAX_ROWS ? MAX_ROWS : TILE_SUMS / strip < 1 ? 1 : TILE_SUMS / strip;
}

// A matrix (k, n) in memory.
struct Matrix {
  const T* data;
  int64_t k, n;  // strides, in elements
};

// sums[r][s] = (add ? sums[r][s] : 0) + sum over k of x[r * row + k * step] * w[k][s]
using TileProduct = void (*)(const T* x, int64_t row, int64_t step, const T* w, int64_t depth, bool add, V* sums);

// L columns of a matrix in memory, of which the first `columns` exist.
struct MatrixPanel {
  Matrix matrix;  // from its first column on; the stride of k or of n is 1
  int64_t columns;
};

// sums[r][s] = (add ? sums[r][s] : 0) + sum over k of x[r * row + k * step] * panels[s][k], with the bits of a TileProduct.
using DirectProduct = void (*)(const T* x, int64_t row, int64_t step, const MatrixPanel* panels, int count,
                               int64_t depth, bool add, V* sums);

// How a matrix is packed. Formats with fewer bits are those of a float kernel, see quantized_products.cpp.
enum WeightFormat : int64_t { PLAIN, INT8, BFLOAT16, FLOAT16, FORMATS };

// Returns how many elements of 32 bits a packed column has. In int8, the first two are its scale and its offset.
static inline int64_t packed_lines(WeightFormat format, int64_t depth) {
  return format == PLAIN ? depth : format == INT8 ? 2 + (depth + 3) / 4 : (depth + 1) / 2;
}

// Returns the distance between rows that a product reads. In int8, a row begins with its scale.
static inline int64_t row_stride(WeightFormat format, int64_t depth) {
  return format == INT8 ? 1 + (depth + 3) / 4 : depth;
}

// Packs one panel of a strip: columns column .. column + L of depth rows; zeros from column `width` on.
using PackPanel = void (*)(T* to, int strip, Matrix matrix, int64_t depth, int64_t column, int64_t width);

// Products with matrices in a format with fewer bits. Their tiles compute whole sums: `step` is 1, `add` false.
struct QuantizedProducts {
  TileProduct tiles[MAX_ROWS][MAX_STRIP];
  PackPanel pack;
  // Quantizes a row. A scale of 0 stands for that of its largest value.
  void (*quantize)(const T* x, int64_t depth, T scale, T* to);
};

struct Products {
  RunParallel run;
  ScratchMemory scratch;
  TileProduct tiles[MAX_ROWS][MAX_STRIP];  // by rows and panels, each less one
  DirectProduct direct[MAX_DIRECT_ROWS];   // by rows, less one
  PackPanel pack;
  const QuantizedProducts* formats[FORMATS];  // null unless they are loaded
};
