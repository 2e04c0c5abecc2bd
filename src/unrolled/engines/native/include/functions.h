// Elementwise functions on vectors. In float32 all are within 2 units in the last place for every input, and have the
// same bits in every lane. In float64 this holds for exp, expm1, sigmoid and tanh; the others call libm.
#pragma once
#include "basic_functions.h"
#include "exponential.h"
#include "logarithm.h"
#include "trigonometric.h"
#include "wide.h"
