/* @name@: a model exported by unrolled @version@. Compile it with -O3 -ffp-contract=off. */
#if defined(@NAME@_SUFFIX) /* the functions of one instruction set, among which @name@_dispatch.c chooses */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define @name@_init JOIN(@name@_init, @NAME@_SUFFIX)
#define @name@_reset JOIN(@name@_reset, @NAME@_SUFFIX)
#define @name@_step JOIN(@name@_step, @NAME@_SUFFIX)
#define @name@_run JOIN(@name@_run, @NAME@_SUFFIX)
#define @name@_selftest JOIN(@name@_selftest, @NAME@_SUFFIX)
#endif
#include "@name@.h"

