// Products with matrices in one format with fewer bits, FORMAT, a WeightFormat. They are compiled once for each format
// that a kernel uses. cells/quantized_products.py defines the results.
//
// A packed column consists of words of 32 bits: four int8 or two 16-bit weights, of consecutive terms. In int8, a row
// is quantized like a column, and sums of whole numbers are exact, so an element has the same bits whatever the
// processor, the tile shape, the batch size and the number of threads.
#include "products.h"

#include <algorithm>
#include <utility>

namespace {

static_assert(sizeof(T) == 4, "formats with fewer bits are those of float kernels");
constexpr T LARGEST = 127;
constexpr T SMALLEST = 0x1p-100f;        // rows and columns with smaller values count as zeros
constexpr T TO_INTEGER = 0x1.8p23f;      // y + TO_INTEGER has y, rounded to the nearest, in its last bits
constexpr int32_t INFINITE = 0x7f800000;
constexpr T LARGEST_FLOAT16 = 65504;

template <class To, class From> inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

inline VI load_words(const T* p) { return bits_of<VI>(load(p)); }

// ---- sums of four products of int8 in each of L lanes ----

#if defined(__AVX512VNNI__)
constexpr int OFFSET = 128;  // added to the row, because it must be unsigned
struct Factor { VI x; };
inline Factor factor(int32_t four) { return {four - VI{}}; }
inline VI add_products(VI sum, const Factor& f, VI w) {
  return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)f.x, (__m512i)w);
}
#elif defined(__AVXVNNI__)
constexpr int OFFSET = 128;
struct Factor { VI x; };
inline Factor factor(int32_t four) { return {four - VI{}}; }
inline VI add_products(VI sum, const Factor& f, VI w) {
  return (VI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)f.x, (__m256i)w);
}
#elif defined(__AVX512BW__)
// The absolute values of the row, and the weights with its signs. Weights are never -128, so that no sum saturates.
constexpr int OFFSET = 0;
struct Factor { __m512i magnitude; __mmask64 negative; };
inline Factor factor(int32_t four) {
  const __m512i x = _mm512_set1_epi32(four);
  return {_mm512_abs_epi8(x), _mm512_movepi8_mask(x)};
}
inline VI add_products(VI sum, const Factor& f, VI w) {
  const __m512i v = (__m512i)w, signed_w = _mm512_mask_sub_epi8(v, f.negative, _mm512_setzero_si512(), v);
  return sum + (VI)_mm512_madd_epi16(_mm512_maddubs_epi16(f.magnitude, signed_w), _mm512_set1_epi16(1));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int OFFSET = 0;
struct Factor { __m256i x, magnitude; };
inline Factor factor(int32_t four) {
  const __m256i x = _mm256_set1_epi32(four);
  return {x, _mm256_abs_epi8(x)};
}
inline VI add_products(VI sum, const Factor& f, VI w) {
  const __m256i pairs = _mm256_maddubs_epi16(f.magnitude, _mm256_sign_epi8((__m256i)w, f.x));
  return sum + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int OFFSET = 0;
struct Factor { int8x16_t x; };
inline Factor factor(int32_t four) { return {vreinterpretq_s8_s32(vdupq_n_s32(four))}; }
inline VI add_products(VI sum, const Factor& f, VI w) {
  return (VI)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_s32((int32x4_t)w), f.x);
}
#elif defined(__SSE2__) && !defined(__AVX__)
constexpr int OFFSET = 0;
inline __m128i low_halves(__m128i v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); }
inline __m128i high_halves(__m128i v) { return _mm_srai_epi16(_mm_unpackhi_epi8(v, v), 8); }
struct Factor { __m128i x; };
inline Factor factor(int32_t four) { return {low_halves(_mm_set1_epi32(four))}; }
inline VI add_products(VI sum, const Factor& f, VI w) {
  const __m128 a = (__m128)_mm_madd_epi16(low_halves((__m128i)w), f.x);
  const __m128 b = (__m128)_mm_madd_epi16(high_halves((__m128i)w), f.x);
  return sum + (VI)_mm_shuffle_ps(a, b, 0x88) + (VI)_mm_shuffle_ps(a, b, 0xdd);
}
#else
constexpr int OFFSET = 0;
struct Factor { int32_t x[4]; };
inline Factor factor(int32_t four) {
  return {{four << 24 >> 24, four << 16 >> 24, four << 8 >> 24, four >> 24}};
}
inline VI add_products(VI sum, const Factor& f, VI w) {
  return sum + (w << 24 >> 24) * f.x[0] + (w << 16 >> 24) * f.x[1] + (w << 8 >> 24) * f.x[2] + (w >> 24) * f.x[3];
}
#endif

template <int R, int S>
void multiply_int8(const T* x, int64_t row, int64_t, const T* w, int64_t depth, bool, V* sums) {
  constexpr bool fits = R > 1 && R * S + S + 1 <= REGISTERS;
  const int64_t words = (depth + 3) / 4;
  const T* const scales = w;
  VI g[R][S];
  w += S * L;
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 32
    for (int s = 0; s < S; s++) g[r][s] = load_words(w + s * L);
  w += S * L;
  for (int64_t k = 1; k <= words; k++, w += S * L) {
    VI m[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) m[s] = fits ? bits_of<VI>(in_register(load(w + s * L))) : load_words(w + s * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Factor f = factor(bits_of<int32_t>(x[r * row + k]));
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) g[r][s] = add_products(g[r][s], f, m[s]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 32
    for (int s = 0; s < S; s++)
      sums[r * S + s] = __builtin_convertvector(g[r][s], V) * load(scales + s * L) * splat(x[r * row]);
}

// Returns y as a whole number from -127 to 127.
inline V rounded(V y) {
  y = y < splat(LARGEST) ? y : splat(LARGEST);
  return y > splat(-LARGEST) ? y : splat(-LARGEST);
}

void quantize_row(const T* x, int64_t depth, T scale, T* to) {
  VI most{};
  for (int64_t k = 0; k < depth; k += L) {  // bits of absolute values are in the order of the values, and NaN is last
    const VI magnitude = bits_of<VI>(load(x + k, depth - k)) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  int32_t largest_bits = 0;
  for (int j = 0; j < L; j++) largest_bits = std::max(largest_bits, (int32_t)most[j]);
  const T largest = bits_of<T>(largest_bits);
  T inverse = scale ? 1 / scale : 0;
  if (largest_bits >= INFINITE) {
    scale = std::numeric_limits<T>::quiet_NaN(), inverse = 0;
  } else if (!scale && largest >= SMALLEST) {
    scale = largest / LARGEST, inverse = LARGEST / largest;
  }
  *to++ = scale;
  const int64_t words = (depth + 3) / 4;
  for (int64_t k = 0; k < depth; k += L) {
    const V y = rounded(load(x + k, depth - k) * splat(inverse));
    const VI q = bits_of<VI>(y + splat(TO_INTEGER)) - bits_of<VI>(splat(TO_INTEGER)) + OFFSET;
    int8_t bytes[L];
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)bytes, _mm512_cvtepi32_epi8((__m512i)q));
#else
    for (int j = 0; j < L; j++) bytes[j] = (int8_t)q[j];
#endif
    std::memcpy(to + k / 4, bytes, std::min<int64_t>(L, 4 * words - k));
  }
}

void pack_int8(T* to, int strip, Matrix matrix, int64_t depth, int64_t column, int64_t width) {
  const int64_t line = (int64_t)strip * L, words = (depth + 3) / 4;
  for (int64_t j = 0; j < L; j++) {
    const T* const from = matrix.data + (column + j) * matrix.n;
    T largest = 0, scale = 0;
    bool finite = true;
    const int64_t terms = column + j < width ? depth : 0;
    for (int64_t k = 0; k < terms; k++) {
      const T magnitude = std::fabs(from[k * matrix.k]);
      finite &= magnitude < std::numeric_limits<T>::infinity();
      largest = magnitude > largest ? magnitude : largest;
    }
    if (!finite) scale = std::numeric_limits<T>::quiet_NaN();
    else if (largest >= SMALLEST)  // rounded up, so that it has 17 bits
      scale = bits_of<T>((bits_of<int32_t>(largest / LARGEST) + 0x7f) & ~0x7f);
    int32_t sum = 0;
    for (int64_t word = 0; word < words; word++) {
      int8_t four[4] = {};
      for (int64_t k = 4 * word; scale > 0 && k < std::min(4 * word + 4, terms); k++)
        four[k % 4] = (int8_t)std::nearbyint(from[k * matrix.k] / scale), sum += four[k % 4];
      std::memcpy(to + (2 + word) * line + j, four, 4);
    }
    to[j] = scale;
    to[line + j] = bits_of<T>(-OFFSET * sum);
  }
}

// ---- 16 bits ----

inline V float16_to_float(VI half) {  // the values are finite or NaN
  const VI magnitude = half & 0x7fff;
  const V value = bits_of<V>(magnitude << 13) * splat(0x1p112f);
  const VI result = magnitude > 0x7c00 ? VI{} + 0x7fc00000 : bits_of<VI>(value);
  return bits_of<V>(result | (half & 0x8000) << 16);
}

inline V even_term(VI words) { return FORMAT == BFLOAT16 ? bits_of<V>(words << 16) : float16_to_float(words); }

inline V odd_term(VI words) {
  return FORMAT == BFLOAT16 ? bits_of<V>(words & (int32_t)0xffff0000) : float16_to_float(words >> 16 & 0xffff);
}

// The sums have the bits of those of a plain matrix with the same values.
template <int R, int S>
void multiply_16_bits(const T* x, int64_t row, int64_t, const T* w, int64_t depth, bool, V* sums) {
  static_assert(BLOCK % 2 == 0);
  for (int64_t from = 0; from < depth; from += BLOCK) {
    V g[R][S] = {};
    const int64_t end = std::min<int64_t>(from + BLOCK, depth);
    for (int64_t k = from; k < end; k += 2, w += S * L) {
      VI m[S];
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) m[s] = load_words(w + s * L);
      const bool has_odd = k + 1 < end;
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) {
        const V even = even_term(m[s]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) g[r][s] = fma(even, splat(x[r * row + k]), g[r][s]);
        if (!has_odd) continue;
        const V odd = odd_term(m[s]);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) g[r][s] = fma(odd, splat(x[r * row + k + 1]), g[r][s]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) sums[r * S + s] = from ? sums[r * S + s] + g[r][s] : g[r][s];
  }
}

uint16_t to_bfloat16(T x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(T x) {
  if (x != x) return 0x7e00;
  const uint16_t sign = bits_of<uint32_t>(x) >> 16 & 0x8000;
  const T magnitude = std::min(std::fabs(x), LARGEST_FLOAT16);
  if (magnitude < 0x1p-14f)  // the sum has the rounded multiple of 2^-24 in its last bits
    return sign | (uint16_t)(bits_of<uint32_t>(magnitude + 0.5f) - bits_of<uint32_t>(0.5f));
  const uint32_t bits = bits_of<uint32_t>(magnitude) - (112u << 23);
  return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

void pack_16_bits(T* to, int strip, Matrix matrix, int64_t depth, int64_t column, int64_t width) {
  const int64_t line = (int64_t)strip * L, words = (depth + 1) / 2;
  for (int64_t j = 0; j < L; j++) {
    const int64_t terms = column + j < width ? depth : 0;
    const T* const from = matrix.data + (column + j) * matrix.n;
    for (int64_t word = 0; word < words; word++) {
      uint16_t two[2] = {};
      for (int64_t k = 2 * word; k < std::min(2 * word + 2, terms); k++)
        two[k % 2] = FORMAT == BFLOAT16 ? to_bfloat16(from[k * matrix.k]) : to_float16(from[k * matrix.k]);
      const uint32_t both = two[0] | (uint32_t)two[1] << 16;
      to[word * line + j] = bits_of<T>(both);
    }
  }
}

QuantizedProducts table{};

template <int S, int... R> void fill_rows(std::integer_sequence<int, R...>) {
  if constexpr (FORMAT == INT8) ((table.tiles[R][S - 1] = multiply_int8<R + 1, S>), ...);
  else ((table.tiles[R][S - 1] = multiply_16_bits<R + 1, S>), ...);
}

template <int... S> void fill(std::integer_sequence<int, S...>) {
  (fill_rows<S + 1>(std::make_integer_sequence<int, rows_of(S + 1)>()), ...);
}

}  // namespace

EXPORT const QuantizedProducts* quantized_products() {
  fill(std::make_integer_sequence<int, MAX_STRIP>());
  table.pack = FORMAT == INT8 ? pack_int8 : pack_16_bits;
  table.quantize = quantize_row;
  return &table;
}
