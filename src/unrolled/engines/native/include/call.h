// The arguments of a kernel, except for its pointers: they stay the same from call to call. call_arguments.py mirrors
// the struct.
#pragma once
#include <cstdint>

struct Products;

enum Strategy : int64_t {
  SHARE_COLUMNS,  // each thread has some columns
  SHARE_ROWS,     // each thread has some rows of the batch
  TAKE_TURNS,     // threads run whole blocks of steps in turn
};

struct CallArguments {
  int64_t steps;          // number of time steps
  int64_t rows;           // batch size, or of the first step if the sequences have different lengths
  int64_t reverse;        // 1: from the last time step to the first
  int64_t shift;          // where a state of another loop is found: 1 or -1 step away; 0: not shifted
  int64_t threads;        // maximum number of threads
  int64_t block_steps;    // number of steps in a block, for which products of the input are computed at once
  int64_t pack_per_step;  // 1: pack weights a block at a time in every step, not once before the loop
  int64_t packed;         // 1: the matrices were packed by an earlier call
  int64_t strategy;       // how threads share the work, see Strategy
  const int64_t* sizes;   // widths, offsets and strides of the kernel
  const Products* products;
};
