// Compares the vector functions with libm in higher precision, over float bit patterns.
//
// Compiled once for each instruction set with -DKERNEL=name (only the vector functions), and once with
// -DKERNELS="X(name) X(name) ..." (the comparison, linked with the others), both with the functions of one and two
// vectors and their C++, -DUNARY="X(exp, exp(a)) ..." and -DBINARY="X(pow, pow(a, b)) ...". Prints a line for each kernel: the
// function, the kernel, the largest error in units in the last place and its arguments, the number of signs of zero,
// NaNs and infinities that differ from libm and the arguments of the first, and the number of results that depend on
// the lane.
#ifndef TYPE
#define TYPE float
#endif
using T = TYPE;

#ifdef KERNEL
#include "functions.h"

template <class F> static void all(T* to, const T* x, const T* y, long n, F f) {
  for (long i = 0; i < n; i += L) store(to + i, f(load(x + i, n - i), load(y + i, n - i)), n - i);
}

extern "C" void KERNEL(int function, T* to, const T* x, const T* y, long n) {
  int number = 0;
#define X(name, expression) \
  if (function == number++) return all(to, x, y, n, [](V a, [[maybe_unused]] V b) { return expression; });
  UNARY BINARY
#undef X
}

#else
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#define X(name) extern "C" void name(int, T*, const T*, const T*, long);
KERNELS
#undef X

constexpr bool SINGLE = sizeof(T) == 4;
using Bits = std::conditional<SINGLE, uint32_t, uint64_t>::type;
using Exact = std::conditional<SINGLE, double, long double>::type;

static Exact sigmoid(Exact x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
static Exact relu(Exact x) { return x < 0 ? 0 : x; }
static Exact sign(Exact x) { return (x > 0) - (x < 0); }
static Exact round_even(Exact x) { return std::nearbyint(x); }
static Exact reciprocal(Exact x) { return 1 / x; }
static Exact floored_remainder(Exact x, Exact y) {
  const Exact r = std::fmod(x, y);
  return r != 0 && (y < 0) != (r < 0) ? r + y : r;
}
static Exact larger(Exact x, Exact y) { return x != x || y != y ? NAN : y > x ? y : x; }
static Exact smaller(Exact x, Exact y) { return x != x || y != y ? NAN : y < x ? y : x; }

struct Function {
  const char* name;
  int arguments;
  void (*evaluate)(Exact* to, const T* x, const T* y, long n);
};

namespace libm {  // the exact values of the functions
using std::exp, std::exp2, std::expm1, std::log, std::log2, std::log10, std::log1p, std::sqrt, std::tanh, std::erf;
using std::erfc, std::sin, std::cos, std::tan, std::asin, std::acos, std::atan, std::sinh, std::cosh, std::asinh;
using std::acosh, std::atanh, std::floor, std::ceil, std::trunc, std::pow, std::atan2, std::hypot, std::fmod;
using ::sigmoid, ::relu, ::sign, ::reciprocal;
static Exact rsqrt(Exact x) { return 1 / std::sqrt(x); }  // newer C libraries define one, too
static Exact round(Exact x) { return round_even(x); }
static Exact remainder(Exact x, Exact y) { return floored_remainder(x, y); }
static Exact maximum(Exact x, Exact y) { return larger(x, y); }
static Exact minimum(Exact x, Exact y) { return smaller(x, y); }
}  // namespace libm

static const Function functions[] = {
#define X(name, expression) \
  {#name, 1, [](Exact* to, const T* x, const T*, long n) { \
     for (long i = 0; i < n; i++) to[i] = libm::name((Exact)x[i]); \
   }},
    UNARY
#undef X
#define X(name, expression) \
  {#name, 2, [](Exact* to, const T* x, const T* y, long n) { \
     for (long i = 0; i < n; i++) to[i] = libm::name((Exact)x[i], (Exact)y[i]); \
   }},
    BINARY
#undef X
};

struct Kernel {
  const char* name;
  void (*evaluate)(int, T*, const T*, const T*, long);
};
#define X(name) {#name, name},
static const Kernel kernels[] = {KERNELS};
#undef X
constexpr int COUNT = sizeof kernels / sizeof kernels[0];

struct ErrorSummary {
  double error = 0;
  T x = 0, y = 0;
  long wrong = 0;  // NaN, infinity or the sign of a zero
  T wrong_x = 0, wrong_y = 0;
};

// Returns 1 / the distance between neighboring numbers at a value.
static Exact per_unit(double value) {
  constexpr int min_exponent = SINGLE ? -126 : -1022, digits = SINGLE ? 23 : 52;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = std::max((int)(bits >> 52 & 2047) - 1023, min_exponent);
  if (!SINGLE) return std::ldexp((Exact)1, digits - exponent);
  bits = (uint64_t)(1023 + digits - exponent) << 52;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

static void compare(ErrorSummary& summary, T actual, Exact truth, T x, T y) {
  constexpr T largest = std::numeric_limits<T>::max();
  const Exact end = SINGLE ? (Exact)0x1p128 : std::ldexp((Exact)1, 1024);  // numbers from here on round to infinity
  const T rounded = (T)truth;
  bool wrong;
  if (actual != actual || truth != truth) {
    wrong = (actual != actual) != (truth != truth);
  } else if (std::isinf(actual) != std::isinf(rounded)) {  // allowed if the other one is the largest number
    wrong = std::fabs(actual) < largest || std::fabs(rounded) < largest || (actual < 0) != (truth < 0);
  } else {
    wrong = (actual != 0 || rounded == 0) && std::signbit(actual) != std::signbit(rounded);
  }
  if (wrong && !summary.wrong++) summary.wrong_x = x, summary.wrong_y = y;
  if (wrong || truth != truth) return;
  const auto finite = [end](Exact v) { return std::isinf((T)v) ? std::copysign(end, v) : v; };
  const double magnitude = (double)std::min(std::fabs(truth), (Exact)largest);
  const double error = (double)(std::fabs(finite(actual) - finite(truth)) * per_unit(magnitude));
  if (error > summary.error) summary.error = error, summary.x = x, summary.y = y;
}

static uint64_t random_bits() {  // splitmix64
  static uint64_t state = 20261123;
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

static T as_number(uint64_t bits) {
  const Bits pattern = (Bits)(SINGLE ? bits >> 32 : bits);
  T value;
  std::memcpy(&value, &pattern, sizeof value);
  return value;
}

static T random_between(double low, double high) { return (T)(low + (high - low) * (random_bits() >> 11) * 0x1p-53); }

int main(int, char** arguments) {
  const std::string function = arguments[1];
  const double from = std::atof(arguments[2]), to = std::atof(arguments[3]);  // part of all bit patterns, 0 to 1
  const uint64_t stride = std::strtoull(arguments[4], nullptr, 10);  // compare every stride-th bit pattern
  const long random = std::atol(arguments[5]);  // number of random arguments

  std::vector<T> specials;
  const double corners[] = {0, 1, 0.5, 2, 3, 1.5, 2.5, 4, 0.25, 9.01, 17.33, 88.72284, 88.7229, 87.4, 103.9, 104,
                            126, 127, 128, 149, 150, 709.79, 745.2, 4194303.5, 8388607.5, 8388608, 8388609, 16777215,
                            16777216, 65536, 1.57079637, 3.14159274, 10.05, 3.83, INFINITY, NAN};
  for (double c : corners)
    for (T s : {T(1), T(-1)})
      for (T d : {-std::numeric_limits<T>::infinity(), T(0), std::numeric_limits<T>::infinity()})
        specials.push_back(s * (d == 0 ? T(c) : std::nextafter(T(c), d)));
  for (T s : {T(1), T(-1)})
    for (T c : {std::numeric_limits<T>::max(), std::numeric_limits<T>::min(), std::numeric_limits<T>::denorm_min(),
                std::numeric_limits<T>::min() / 2, std::nextafter(std::numeric_limits<T>::min(), T(0))})
      specials.push_back(s * c);

  int number = -1;
  for (int k = 0; k < (int)(sizeof functions / sizeof functions[0]); k++)
    if (function == functions[k].name) number = k;
  if (number < 0) return 2;
  const Function& f = functions[number];
  ErrorSummary summary[COUNT];
  std::vector<T> x, y, results[COUNT];
  std::vector<Exact> truth;

  const auto flush = [&] {
    const long n = (long)x.size();
    y.resize(n);
    for (int k = 0; k < COUNT; k++) {
      results[k].resize(n);
      kernels[k].evaluate(number, results[k].data(), x.data(), y.data(), n);
    }
    truth.resize(n);
    f.evaluate(truth.data(), x.data(), y.data(), n);
    for (int k = 0; k < COUNT; k++) {
      // A first pass without branches. The bits of errors are in the same order as the errors; NaN is above all.
      uint64_t max_bits = 0, zeros = 0;
      for (long i = 0; i < n; i++) {
        const double error = (double)(std::fabs(results[k][i] - truth[i]) * per_unit((double)truth[i]));
        uint64_t bits;
        std::memcpy(&bits, &error, sizeof bits);
        max_bits = std::max(max_bits, bits), zeros |= results[k][i] == 0;
      }
      double error;
      std::memcpy(&error, &max_bits, sizeof error);
      if (!zeros && error <= summary[k].error) continue;
      for (long i = 0; i < n; i++) compare(summary[k], results[k][i], truth[i], x[i], y[i]);
    }
    x.clear(), y.clear();
  };
  const auto add = [&](T a, T b) {
    x.push_back(a), y.push_back(b);
    if (x.size() == 4096) flush();
  };

  const auto second_argument = [&](T a) {  // of similar size, or such that the power is finite
    switch (random_bits() % 4) {
      case 0: return as_number(random_bits());
      case 1: return (T)(a * random_between(-4, 4));
      case 2: return random_between(-40, 40);
      default: return (T)(random_between(-150, 129) / std::log2(std::fabs((double)a)));
    }
  };
  if (f.arguments == 1) {
    for (T s : specials) add(s, 0);
    const double all = SINGLE ? 0x1p32 : 0x1p64;
    const uint64_t first = (uint64_t)(from * all), count = (uint64_t)((to - from) * all / (double)stride);
    flush();
    for (uint64_t at = 0; at < count; at += 4096) {
      x.resize(std::min<uint64_t>(count - at, 4096));
      for (size_t i = 0; i < x.size(); i++) x[i] = as_number((first + (at + i) * stride) << (SINGLE ? 32 : 0));
      flush();
    }
  } else {
    for (T s : specials)
      for (T r : specials) add(s, r);
  }
  for (long i = 0; i < random; i++) {
    const double limits[] = {0, 3, 110, 750};
    const T a = i % 4 ? random_between(-limits[i % 4], limits[i % 4]) : as_number(random_bits());
    add(a, f.arguments == 1 ? T(0) : second_argument(a));
  }
  flush();

  // Results must have the same bits in every lane, whatever the other lanes hold.
  long lane_dependent = 0;
  const size_t size = 1 << 12;
  std::vector<T> x_values(size), rotated(size), out(size), out_rotated(size), y_values(size, T(0.75));
  for (auto& v : x_values)
    v = random_bits() % 8 ? random_between(-100, 100) : specials[random_bits() % specials.size()];
  for (int k = 0; k < COUNT; k++)
    for (long shift = 1; shift < 16; shift++) {
      std::rotate_copy(x_values.begin(), x_values.begin() + shift * 37, x_values.end(), rotated.begin());
      kernels[k].evaluate(number, out.data(), x_values.data(), y_values.data(), (long)x_values.size());
      kernels[k].evaluate(number, out_rotated.data(), rotated.data(), y_values.data(), (long)x_values.size() - shift);
      for (size_t i = 0; i < x_values.size() - shift; i++) {
        const T a = out[(i + shift * 37) % x_values.size()], b = out_rotated[i];
        lane_dependent += std::memcmp(&a, &b, sizeof a) != 0 && !(a != a && b != b);
      }
    }
  for (int k = 0; k < COUNT; k++)
    std::printf("%s %s %.4f %a %a %ld %a %a %ld\n", f.name, kernels[k].name, summary[k].error, (double)summary[k].x,
                (double)summary[k].y, summary[k].wrong, (double)summary[k].wrong_x, (double)summary[k].wrong_y,
                lane_dependent);
}
#endif
