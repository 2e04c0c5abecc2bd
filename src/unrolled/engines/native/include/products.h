// Matrix products: the same for every cell, compiled once for a machine and a dtype (products.cpp).
//
// A matrix is packed in panels of L columns: a strip of S panels lies as (k, S, L). Sums run over k in
// order, in blocks of BLOCK that are added up in order too: whatever the tile, the batch and the threads,
// an element gets the same bits.
#pragma once
#include "team.h"
#include "vectors.h"

constexpr int BLOCK = 32;                                        // of k
constexpr int SUMS = REGISTERS == 32 ? 24 : 12;                  // vectors that a tile accumulates
constexpr int STRIP = 8;                                         // panels side by side, at most
constexpr int MOST = 6;                                          // rows of a tile, at most
constexpr int rows_of(int strip) { return SUMS / strip > MOST ? MOST : SUMS / strip < 1 ? 1 : SUMS / strip; }

// A matrix (k, n) as it lies in memory.
struct Matrix {
  const T* from;
  long k, n;  // strides, in elements
};

// sums[r][s] = (more ? sums[r][s] : 0) + sum over k of x[r * row + k * step] * w[k][s]
using Tile = void (*)(const T* x, long row, long step, const T* w, long depth, bool more, V* sums);

struct Products {
  TeamRun team;
  TeamRoom room;
  Tile tiles[MOST][STRIP];  // by rows and panels, less one each
  // One panel of a strip: columns column .. column + L of depth rows, those from width on 0.
  void (*pack)(T* to, int strip, Matrix matrix, long depth, long column, long width);
};
