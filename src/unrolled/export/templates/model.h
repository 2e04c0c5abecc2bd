/* @name@: a model exported by unrolled @version@. C11, without heap, locks, threads, system calls or exceptions.
 *
 * Place a @name@_state anywhere, call @name@_init once, and then step or run. Different states are independent, also in
 * different threads. */
#ifndef @NAME@_H
#define @NAME@_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define @NAME@_VERSION "@version@" /* of unrolled */
#define @NAME@_FORMAT @format@        /* of the weights and this interface */
#define @NAME@_INPUT @input@ /* numbers of x in each step */
#define @NAME@_OUTPUT @output@ /* numbers of y in each step */
#define @NAME@_WEIGHTS_BYTES @bytes@
#define @NAME@_WORK @work@ /* numbers of memory that run needs for each step, beside the state */

/* The states of all layers, and the memory for a step. Its content may be copied to continue from it later. */
typedef struct @name@_state {
  float values[@memory@];
  int32_t turn;
@pointer@} @name@_state;

/* Prepares the memory for the first step. Returns 0, or another number if the weights don't fit this code. */
@init@;

/* Starts a new sequence. */
void @name@_reset(@name@_state *state);

@step@/* @run_comment@ */
@run@;

/* Runs a short sequence with known output. Returns 0 if the numbers are right, and stores the largest difference unless
 * the pointer is null: 0 means the same bits. Uses the state, so call reset or init afterwards. */
int @name@_selftest(@name@_state *state, float *difference);

#ifdef __cplusplus
}
#endif
#endif
