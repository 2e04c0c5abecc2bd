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

struct Products {
  RunParallel run;
  ScratchMemory scratch;
  TileProduct tiles[MAX_ROWS][MAX_STRIP];  // by rows and panels, each less one
  // Packs one panel of a strip: columns column .. column + L of depth rows; zeros from column `width` on.
  void (*pack)(T* to, int strip, Matrix matrix, int64_t depth, int64_t column, int64_t width);
};
