// Compares the vector functions with libm in more digits, over float bit patterns.
//
// Built once for each instruction set with -DKERNEL=name (the vector code alone), and once with
// -DKERNELS="X(name) X(name) ..." (the comparison, which links with those). Prints a line for each function
// and kernel: the largest error in units in the last place and where, and how many signs of zero, NaN and
// infinities are not those of libm.
#ifndef TYPE
#define TYPE float
#endif
using T = TYPE;

#define ONE(X) \
  X(exp) X(exp2) X(expm1) X(log) X(log2) X(log10) X(log1p) X(sqrt) X(sigmoid) X(tanh) X(relu) X(erf) X(erfc) X(sin) \
  X(cos) X(tan) X(asin) X(acos) X(atan) X(sinh) X(cosh) X(asinh) X(acosh) X(atanh) X(sign) X(floor) X(ceil) \
  X(round) X(trunc) X(rsqrt) X(reciprocal)
#define TWO(X) X(pow) X(atan2) X(hypot) X(fmod) X(remainder) X(maximum) X(minimum)

#ifdef KERNEL
#include "functions.h"

static inline V rsqrt(V x) { return splat(1) / sqrt(x); }  // as in vocabulary.py
static inline V reciprocal(V x) { return splat(1) / x; }

template <class F> static void all(T* to, const T* x, const T* y, long n, F f) {
  for (long i = 0; i < n; i += L) store(to + i, f(load(x + i, n - i), load(y + i, n - i)), n - i);
}

extern "C" void KERNEL(int function, T* to, const T* x, const T* y, long n) {
  int number = 0;
#define X(name) \
  if (function == number++) return all(to, x, y, n, [](V a, V) { return name(a); });
  ONE(X)
#undef X
#define X(name) \
  if (function == number++) return all(to, x, y, n, [](V a, V b) { return name(a, b); });
  TWO(X)
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
static Exact floored(Exact x, Exact y) {
  const Exact left = std::fmod(x, y);
  return left != 0 && (y < 0) != (left < 0) ? left + y : left;
}
static Exact larger(Exact x, Exact y) { return x != x || y != y ? NAN : y > x ? y : x; }
static Exact smaller(Exact x, Exact y) { return x != x || y != y ? NAN : y < x ? y : x; }

struct Function {
  const char* name;
  int arguments;
  void (*of)(Exact* to, const T* x, const T* y, long n);
};

namespace libm {
using std::exp, std::exp2, std::expm1, std::log, std::log2, std::log10, std::log1p, std::sqrt, std::tanh, std::erf;
using std::erfc, std::sin, std::cos, std::tan, std::asin, std::acos, std::atan, std::sinh, std::cosh, std::asinh;
using std::acosh, std::atanh, std::floor, std::ceil, std::trunc, std::pow, std::atan2, std::hypot, std::fmod;
using ::sigmoid, ::relu, ::sign, ::reciprocal;
static Exact rsqrt(Exact x) { return 1 / std::sqrt(x); }  // newer C libraries have one of their own
static Exact round(Exact x) { return round_even(x); }
static Exact remainder(Exact x, Exact y) { return floored(x, y); }
static Exact maximum(Exact x, Exact y) { return larger(x, y); }
static Exact minimum(Exact x, Exact y) { return smaller(x, y); }
}  // namespace libm

#define X(name) \
  {#name, 1, [](Exact* to, const T* x, const T*, long n) { \
     for (long i = 0; i < n; i++) to[i] = libm::name((Exact)x[i]); \
   }},
#define Y(name) \
  {#name, 2, [](Exact* to, const T* x, const T* y, long n) { \
     for (long i = 0; i < n; i++) to[i] = libm::name((Exact)x[i], (Exact)y[i]); \
   }},
static const Function functions[] = {ONE(X) TWO(Y)};
#undef X
#undef Y

struct Kernel {
  const char* name;
  void (*of)(int, T*, const T*, const T*, long);
};
#define X(name) {#name, name},
static const Kernel kernels[] = {KERNELS};
#undef X
constexpr int COUNT = sizeof kernels / sizeof kernels[0];

struct Found {
  double error = 0;
  T x = 0, y = 0;
  long wrong = 0;  // NaN, infinity or the sign of a zero
  T wrong_x = 0, wrong_y = 0;
};

// 1 / the distance between neighbouring numbers at a value, by its exponent.
static Exact per_unit(double value) {
  constexpr int lowest = SINGLE ? -126 : -1022, digits = SINGLE ? 23 : 52;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = std::max((int)(bits >> 52 & 2047) - 1023, lowest);
  if (!SINGLE) return std::ldexp((Exact)1, digits - exponent);
  bits = (uint64_t)(1023 + digits - exponent) << 52;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

static void compare(Found& found, T actual, Exact truth, T x, T y) {
  constexpr T most = std::numeric_limits<T>::max();
  const Exact end = SINGLE ? (Exact)0x1p128 : std::ldexp((Exact)1, 1024);  // where infinity begins
  const T rounded = (T)truth;
  bool wrong;
  if (actual != actual || truth != truth) {
    wrong = (actual != actual) != (truth != truth);
  } else if (std::isinf(actual) != std::isinf(rounded)) {  // one of them is the largest number
    wrong = std::fabs(actual) < most || std::fabs(rounded) < most || (actual < 0) != (truth < 0);
  } else {
    wrong = (actual != 0 || rounded == 0) && std::signbit(actual) != std::signbit(rounded);
  }
  if (wrong && !found.wrong++) found.wrong_x = x, found.wrong_y = y;
  if (wrong || truth != truth) return;
  const auto finite = [end](Exact v) { return std::isinf((T)v) ? std::copysign(end, v) : v; };
  const double at = (double)std::min(std::fabs(truth), (Exact)most);
  const double error = (double)(std::fabs(finite(actual) - finite(truth)) * per_unit(at));
  if (error > found.error) found.error = error, found.x = x, found.y = y;
}

static uint64_t random_bits() {  // splitmix64
  static uint64_t state = 20261123;
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

static T as_number(uint64_t bits) {
  const Bits some = (Bits)(SINGLE ? bits >> 32 : bits);
  T value;
  std::memcpy(&value, &some, sizeof value);
  return value;
}

static T between(double low, double high) { return (T)(low + (high - low) * (random_bits() >> 11) * 0x1p-53); }

int main(int, char** given) {
  const std::string chosen = given[1];  // the function
  const double from = std::atof(given[2]), to = std::atof(given[3]);  // which part of all numbers
  const uint64_t stride = std::strtoull(given[4], nullptr, 10);        // of bit patterns
  const long random = std::atol(given[5]);                             // how many random arguments besides

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
    if (chosen == functions[k].name) number = k;
  if (number < 0) return 2;
  const Function& f = functions[number];
  Found found[COUNT];
  std::vector<T> x, y, results[COUNT];
  std::vector<Exact> truth;

  const auto flush = [&] {
    const long n = (long)x.size();
    y.resize(n);
    for (int k = 0; k < COUNT; k++) {
      results[k].resize(n);
      kernels[k].of(number, results[k].data(), x.data(), y.data(), n);
    }
    truth.resize(n);
    f.of(truth.data(), x.data(), y.data(), n);
    for (int k = 0; k < COUNT; k++) {
      // a first pass without branches; the bits of errors are ordered as the errors are, NaN above all
      uint64_t most = 0, zeros = 0;
      for (long i = 0; i < n; i++) {
        const double error = (double)(std::fabs(results[k][i] - truth[i]) * per_unit((double)truth[i]));
        uint64_t bits;
        std::memcpy(&bits, &error, sizeof bits);
        most = std::max(most, bits), zeros |= results[k][i] == 0;
      }
      double error;
      std::memcpy(&error, &most, sizeof error);
      if (!zeros && error <= found[k].error) continue;
      for (long i = 0; i < n; i++) compare(found[k], results[k][i], truth[i], x[i], y[i]);
    }
    x.clear(), y.clear();
  };
  const auto add = [&](T a, T b) {
    x.push_back(a), y.push_back(b);
    if (x.size() == 4096) flush();
  };

  const auto partner = [&](T a) {  // for the functions of two: of like size, or so that the power is finite
    switch (random_bits() % 4) {
      case 0: return as_number(random_bits());
      case 1: return (T)(a * between(-4, 4));
      case 2: return between(-40, 40);
      default: return (T)(between(-150, 129) / std::log2(std::fabs((double)a)));
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
    const double reach[] = {0, 3, 110, 750};
    const T a = i % 4 ? between(-reach[i % 4], reach[i % 4]) : as_number(random_bits());
    add(a, f.arguments == 1 ? T(0) : partner(a));
  }
  flush();

  // The same numbers in other lanes, beside others, have the same bits.
  long moved = 0;
  const size_t size = 1 << 12;
  std::vector<T> some(size), turned(size), out(size), out_turned(size), other(size, T(0.75));
  for (auto& v : some) v = random_bits() % 8 ? between(-100, 100) : specials[random_bits() % specials.size()];
  for (int k = 0; k < COUNT; k++)
    for (long shift = 1; shift < 16; shift++) {
      std::rotate_copy(some.begin(), some.begin() + shift * 37, some.end(), turned.begin());
      kernels[k].of(number, out.data(), some.data(), other.data(), (long)some.size());
      kernels[k].of(number, out_turned.data(), turned.data(), other.data(), (long)some.size() - shift);
      for (size_t i = 0; i < some.size() - shift; i++) {
        const T a = out[(i + shift * 37) % some.size()], b = out_turned[i];
        moved += std::memcmp(&a, &b, sizeof a) != 0 && !(a != a && b != b);
      }
    }
  for (int k = 0; k < COUNT; k++)
    std::printf("%s %s %.4f %a %a %ld %a %a %ld\n", f.name, kernels[k].name, found[k].error, (double)found[k].x,
                (double)found[k].y, found[k].wrong, (double)found[k].wrong_x, (double)found[k].wrong_y, moved);
}
#endif
