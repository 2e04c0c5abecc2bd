// The functions of one element, on vectors. Float32: within 2 units in the last place over all numbers, the
// same bits in any lane. Float64: exp, expm1, sigmoid and tanh likewise, the others by libm.
#pragma once
#include "angles.h"
#include "exponential.h"
#include "logarithm.h"
#include "plain.h"
#include "wide.h"
