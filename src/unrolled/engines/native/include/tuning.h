// The constants that affect speed, with the measurements that they come from. Constants without a figure have none on
// record. Python reads this file, too (tuning.py). Sizes are batch x time x hidden. "Zen 3" is an AMD EPYC with AVX2,
// "Zen 4" one with AVX-512: one thread, the best of many calls in turn.
#pragma once
#include <cstddef>
#include <cstdint>

// --- how threads share a loop (kernel.py) ---

// Multiply-adds of a step from which two threads pay off if they synchronize in each step. Input products that are
// computed before the loop aren't counted. One thread / two threads, 100 and 1000 steps: RNN 1x...x64 (5,700
// multiply-adds) 0.85 and 0.78, RNN 8x...x32 (14,600) 0.98 at 100, RNN 1x...x128 (19,600) 1.36 and 1.61, GRU 1x...x64
// (20,600) 1.28 and 1.45, LSTM 1x...x128 (84,000) 1.53 and 1.85 (Zen 4, two cores).
constexpr int64_t STEP_WORK_FOR_TWO_THREADS = 16000;

// Multiply-adds of a call from which two threads pay off. RNN 1x1x128 (36,000) 1.00, RNN 8x1x64 (78,000) 0.95, RNN 1x1x192
// (79,000) 1.14, LSTM 1x1x96 (88,000) 1.06, GRU 1x1x128 (115,000) 1.24, RNN 32x5x16 (146,000) 0.96, RNN 32x50x16
// (1,500,000) 1.17 (Zen 4, two cores).
constexpr int64_t CALL_WORK_FOR_TWO_THREADS = 80000;

// Threads split the rows only if each can read all weights in every step: up to this many bytes of packed weights.
// RNN 32x100x32 from 316 to 117 us (two cores).
constexpr int64_t MAX_SHARED_WEIGHTS = 262144;

// Threads split the rows of products only if each has this many.
constexpr int64_t MIN_ROWS_PER_THREAD = 8;

// Up to this many steps, weights are packed a block at a time in each step. LSTM inference with 1, 2 and 3 steps,
// 1x...x128: 110, 119 and 140 us, and 117, 123 and 130 us if they are packed before the loop (Zen 3).
constexpr int64_t MAX_STEPS_UNPACKED = 2;

// Input products are computed for blocks of steps with this many rows, whose sums take up to this many bytes of a
// thread. 256 rows and 1 MiB instead of 64 rows and 256 KiB: LSTM 8x100x1024 from 94 to 81 ms, GRU 1x100x512 from 3.1
// to 2.9 ms, no change at 8x100x512 and 32x100x512 (medians, measured in turn).
constexpr int64_t BLOCK_ROWS = 256;
constexpr int64_t MAX_HOISTED_SUMS = 1048576;

// --- loops ---

// How far ahead of their use per-step inputs are prefetched, in elements. h = a * h + b in float32, 8x2048x256:
// 24 GB/s 4 KiB ahead, 18 GB/s 4 MiB ahead.
constexpr int64_t PREFETCH_ELEMENTS = 1024;

// Rows whose scalars are computed side by side, to hide the latency of the additions. Layer-norm LSTM 8x100x64: no
// difference beyond the noise between 4 rows and 1 (1.66 and 1.62 ms, Zen 3).
constexpr int SCALAR_ROWS = 4;

// --- matrix products ---

// Terms of a sum in a block. It affects the rounding, too: 32 instead of 64 gave a tenth to a fifth less error and no
// loss of time beyond the noise (18 rows measured in turn, medians 0.87 to 1.06 of the time before).
constexpr int BLOCK = 32;

// Terms of a strip that are packed at a time if the packed matrix isn't kept: rows of a matrix are then read in long runs.
// 256 instead of 32, one thread: RNN 1x1x1024 from 597 to 417 us, LSTM 1x1x1024 from 8.0 to 3.2 ms, LSTM 64x1x512 from
// 4.8 to 3.4 ms (Zen 4).
constexpr int PACKED_TERMS = 256;

// Up to this many rows, products read a matrix that isn't kept from memory, without packing it. One thread, in turn: RNN
// 1x1x512 from 99 to 57 us, RNN 1x1x1024 from 417 to 237 us, LSTM 1x1x512 from 331 to 218 us (Zen 4). Prefetching the
// lines: RNN 1x1x1024 in 343 us; lanes of 16 bytes put in place by loads: 510 us.
constexpr int MAX_DIRECT_ROWS = 4;

// Up to this many terms, products with many rows are written row by row, without packing: gradients of weights in short
// calls. 4096 x 1 x 1024: from 714 to 538 us, 2048 x 1 x 512: from 134 to 95 us (Zen 4).
constexpr int MAX_DIRECT_TERMS = 4;

// Vectors that a tile accumulates, with 16 or 32 vector registers. The others hold the panels and the factor. A tile of
// 4 rows and 4 panels whose panels stay in registers: 116 GFLOP/s instead of 92 (AVX-512).
constexpr int TILE_SUMS_OF_16_REGISTERS = 12;
constexpr int TILE_SUMS_OF_32_REGISTERS = 24;

constexpr int MAX_STRIP = 8;  // panels in a strip
constexpr int MAX_ROWS = 6;   // rows of a tile

// Up to this many rows, strips have MAX_STRIP panels, and otherwise STRIP panels, so that tiles have more rows. LSTM
// 1x100x128: 650 us with wide strips, 664 us without (Zen 3).
constexpr int64_t MAX_ROWS_WIDE_STRIPS = 3;
constexpr int STRIP = 4;

// A packed block of the second factor of a product outside of loops has up to this many rows and columns: 1 MiB in
// float32. With 64 rows, LSTM training 32x100x128 takes the same time within the noise (130 and 124 ms, Zen 3).
constexpr int64_t MAX_DEPTH = 256;
constexpr int64_t MAX_COLUMNS = 1024;

// Multiply-adds from which threads pay off in products and sums outside of loops.
constexpr int64_t MIN_BULK_WORK = 100000;

// --- threads ---

// Attempts of a thread that waits before it lets another thread run.
constexpr int64_t SPINS = 4000;

// Attempts of an idle worker before it sleeps: 100 to 300 microseconds.
constexpr int IDLE_SPINS = 20000;

// Attempts of a caller that waits for its workers to start.
constexpr int START_SPINS = 4000;

// Bytes of scratch memory that a thread keeps between calls.
constexpr size_t MAX_CACHED = 33554432;

// Threads are disabled after this many calls in a row whose threads were kept from a core for this share of the call,
// and stay disabled for up to 2^MAX_DOUBLINGS times the duration of a call. Calls are measured if the one before took
// longer than this many nanoseconds.
constexpr int CONFIRMATIONS = 3;
constexpr int64_t STOLEN_PERCENT = 40;
constexpr int MAX_DOUBLINGS = 4;
constexpr int64_t MIN_CONTENDED_DURATION = 500000;
