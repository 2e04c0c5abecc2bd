// Random numbers from a counter. philox.py describes them and computes the same bits in NumPy: the operations and their
// order must stay the same in both.
#include "platform.h"
#include "thread_pool.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum Kind { UNIFORM, NORMAL, EXPONENTIAL };

constexpr int BLOCKS = 64, COUNT = 4 * BLOCKS;  // counters at a time, and their numbers

// Columns to fill, see philox.py.
struct Entry {
  int64_t stream, kind, width, column;
};

struct Task {
  void* out;
  int64_t is_double, count, stride, seed, entries;
  const int64_t *steps, *rows;
  const Entry* entry;
};

struct Counters {
  uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], high_step[BLOCKS];
};

// Writes the four numbers of each counter to out: first all first numbers, then all second ones, and so on.
void philox(const Counters& c, uint32_t half, uint32_t stream, uint64_t seed, uint32_t* __restrict out) {
  for (int i = 0; i < BLOCKS; i++) {
    uint32_t a = c.c0[i] | half, b = c.c1[i], d = c.c2[i], e = stream;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32) + c.high_step[i];
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      const uint64_t p = (uint64_t)0xD2511F53 * a, q = (uint64_t)0xCD9E8D57 * d;
      a = (uint32_t)(q >> 32) ^ b ^ k0;
      b = (uint32_t)q;
      d = (uint32_t)(p >> 32) ^ e ^ k1;
      e = (uint32_t)p;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    out[i] = a, out[BLOCKS + i] = b, out[2 * BLOCKS + i] = d, out[3 * BLOCKS + i] = e;
  }
}

template <int N> double polynomial(const double (&c)[N], double r) {
  double value = c[N - 1];
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; k--) value = value * r + c[k];
  return value;
}

double log_of(double p) {
  constexpr int64_t SQRT_HALF = 0x3FE6A09E667F3BCD;
  constexpr double SERIES[] = {1.0 / 1, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17,
                               1.0 / 19, 1.0 / 21};
  int64_t bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits -= SQRT_HALF;
  const int64_t exponent = bits >> 52;
  bits = bits - (exponent * ((int64_t)1 << 52)) + SQRT_HALF;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0), z = s * s, e = (double)exponent;
  return e * 6.93147180369123816490e-01 + (2.0 * s * polynomial(SERIES, z) + e * 1.90821492927058770002e-10);
}

constexpr double CENTRAL[2][8] = {
    {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3},
    {1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
     3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3}};
constexpr double MIDDLE[2][8] = {
    {1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4},
    {1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
     1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9}};
constexpr double FAR_OUT[2][8] = {
    {6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7},
    {1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2, 7.86869131145613259100e-4,
     1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15}};

double ratio(const double (&c)[2][8], double r) { return polynomial(c[0], r) / polynomial(c[1], r); }

double tail(double q, double p) {
  const double r = std::sqrt(-log_of(q < 0 ? p : 1.0 - p));
  const double value = r <= 5.0 ? ratio(MIDDLE, r - 1.6) : ratio(FAR_OUT, r - 5.0);
  return q < 0 ? -value : value;
}

// Replaces probabilities by quantiles of the standard normal distribution.
void to_normal(const double* __restrict p, double* __restrict out) {
  for (int i = 0; i < COUNT; i++) {
    const double q = p[i] - 0.5;
    out[i] = q * ratio(CENTRAL, 0.180625 - q * q);
  }
  for (int i = 0; i < COUNT; i++)
    if (std::fabs(p[i] - 0.5) > 0.425) out[i] = tail(p[i] - 0.5, p[i]);
}

template <bool is_double> void numbers(const Counters& c, const Entry& entry, uint64_t seed, double* out) {
  uint32_t high[COUNT], low[COUNT];
  double p[COUNT];
  philox(c, 0, (uint32_t)entry.stream, seed, high);
  if (is_double) philox(c, 0x80000000, (uint32_t)entry.stream, seed, low);
  for (int i = 0; i < COUNT; i++) {
    if (entry.kind == UNIFORM && is_double)
      p[i] = (double)(int64_t)(((uint64_t)high[i] << 21) | (low[i] >> 11)) * 0x1p-53;
    else if (entry.kind == UNIFORM)
      p[i] = (double)(int32_t)(high[i] >> 8) * 0x1p-24;
    else if (is_double)
      p[i] = ((double)(int64_t)(((uint64_t)high[i] << 20) | (low[i] >> 12)) + 0.5) * 0x1p-52;
    else
      p[i] = ((double)high[i] + 0.5) * 0x1p-32;
  }
  if (entry.kind == NORMAL) return to_normal(p, out);
  for (int i = 0; i < COUNT; i++) out[i] = entry.kind == UNIFORM ? p[i] : -log_of(p[i]);
}

template <class T> void fill_entry(const Task& task, const Entry& entry, int64_t first, int64_t end) {
  const int64_t blocks = (entry.width + 3) / 4;
  Counters c{};
  double values[COUNT];
  for (int64_t item = first * blocks; item < end * blocks; item += BLOCKS) {
    const int count = end * blocks - item < BLOCKS ? (int)(end * blocks - item) : BLOCKS;
    for (int i = 0; i < count; i++) {
      const int64_t n = (item + i) / blocks;
      c.c0[i] = (uint32_t)((item + i) % blocks);
      c.c1[i] = (uint32_t)task.rows[n];
      c.c2[i] = (uint32_t)task.steps[n];
      c.high_step[i] = (uint32_t)(task.steps[n] >> 32);
    }
    numbers<sizeof(T) == 8>(c, entry, (uint64_t)task.seed, values);
    for (int i = 0; i < count; i++) {
      const int64_t n = (item + i) / blocks, from = 4 * ((item + i) % blocks);
      T* to = (T*)task.out + n * task.stride + entry.column + from;
      for (int k = 0; k < 4 && from + k < entry.width; k++) to[k] = (T)values[k * BLOCKS + i];
    }
  }
}

void fill_part(void* argument, int id, int threads) {
  const Task& task = *(Task*)argument;
  const int64_t first = task.count * id / threads, end = task.count * (id + 1) / threads;
  for (int64_t k = 0; k < task.entries; k++) {
    if (task.is_double) fill_entry<double>(task, task.entry[k], first, end);
    else fill_entry<float>(task, task.entry[k], first, end);
  }
}

}  // namespace

// Fills columns of the rows of an array. The numbers: the address of the array, whether it holds doubles, its rows, the
// elements of a row, the seed, the number of entries, the addresses of the step and of the row of each row, and the
// entries.
EXPORT void fill_draws(const int64_t* n, RunParallel run, int threads) {
  Task task{(void*)n[0], n[1], n[2], n[3], n[4], n[5], (const int64_t*)n[6], (const int64_t*)n[7], (const Entry*)(n + 8)};
  run(task.count * task.stride < 10000 ? 1 : threads, nullptr, fill_part, &task);
}
