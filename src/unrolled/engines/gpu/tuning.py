"""The constants that affect speed, each with where it comes from."""

# Rows of the batch that one program computes: the least that tl.dot takes.
ROWS = 16

# Warps of a program, and of one whose tiles are wider than this. Compiled for sm_90 with tf32 products, the
# backward kernel of 64 units with four normalized gates has 328 bytes in local memory with 4 warps, and 16
# with 8 warps.
WARPS = 4
WARPS_OF_WIDE_TILES = 8
WIDE_TILE = 32

# Bytes of all matrices of a loop, with padding, up to which they are kept on chip. Those of 64 units with
# four gates in float32 have 64 KiB. Compiled for sm_90, such kernels need 68 KiB (forward) and 132 KiB
# (backward) of the 227 KiB of shared memory. With 128 units they would need 264 and 392 KiB.
MAX_BYTES = 64 * 1024

# Columns of a value, with padding, up to which it is kept in registers. At 128, a tile has 16 registers of
# each thread of 4 warps. A linear recurrence of 128 complex units needs 206 of 255 registers.
MAX_COLUMNS = 128

# Pieces of all phases up to which values are kept in registers: each becomes a few lines of one kernel.
MAX_PIECES = 64

# Columns and rows of a program of a loop whose columns don't depend on each other: a number for each thread
# of 4 warps. The loads of so many steps are under way at the same time. These are estimates.
COLUMN_BLOCK = 128
COLUMN_ROWS = 1
STAGES = 4

# Columns and depth of the blocks of streamed matrices. Compiled for sm_90, blocks of 64 by 32 in float32
# need 68 KiB of shared memory and 150 registers.
BLOCK_COLUMNS = 64
BLOCK_DEPTH = 32

# The same if programs share the columns of a row, each with one or a few blocks. Small blocks occupy more
# multiprocessors: 64 for 1024 columns. 16 is the least that tl.dot takes.
SHARED_BLOCK_COLUMNS = 16
SHARED_BLOCK_DEPTH = 128

# Rows of a program of such a kernel, up to a batch size, and beyond it: each tile of rows reads all matrices
# in each step. 1024 units with four gates have 16 MiB, which an H200 reads in about 3 µs (an estimate).
SHARED_ROWS = 16
SHARED_ROWS_OF_LARGE_BATCHES = 64
LARGE_BATCH = 64
