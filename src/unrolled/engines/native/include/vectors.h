// Vectors of the machine's width: T is the scalar (float or double), V a vector of L scalars.
//
// The compiler doesn't contract operations (-ffp-contract=off). Only fma() gives a fused multiply-add, so a row has the
// same bits in every tile shape.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "platform.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int BYTES = 16, REGISTERS = 32;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

using I = std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
constexpr int L = BYTES / sizeof(T);
typedef T V __attribute__((vector_size(BYTES)));
typedef I VI __attribute__((vector_size(BYTES)));
typedef double Wide __attribute__((vector_size(BYTES)));  // for functions of float that need more digits
typedef int64_t WideI __attribute__((vector_size(BYTES)));

static inline V splat(T x) { return x - V{}; }

static inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Returns v in a register. Otherwise the compiler may load it again for every use, and loads become the bottleneck.
static inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Loads the first n of L elements; the others are 0.
static inline V load(const T* p, int64_t n) {
  if (__builtin_expect(n >= L, 1)) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else return (V)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#else
  V v{};
  for (int64_t k = 0; k < n; k++) v[k] = p[k];
  return v;
#endif
}

static inline void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }

static inline void store(T* p, V v, int64_t n) {
  if (__builtin_expect(n >= L, 1)) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#else
  for (int64_t k = 0; k < n; k++) p[k] = v[k];
#endif
}

// Returns a vector of type W whose elements are all x, or x itself if it is a vector.
template <class W, class X> static inline W as(X x) {
  if constexpr (std::is_arithmetic_v<X>) return (std::remove_reference_t<decltype(W{}[0])>)x - W{};
  else return x;
}

#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
constexpr bool FUSED = true;
#else
constexpr bool FUSED = false;
#endif

// Returns a * b + c, rounded once if the machine can (FUSED). b and c may be scalars.
template <class W, class B, class C> static inline W fma(W a, B b_, C c_) {
  const W b = as<W>(b_), c = as<W>(c_);
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (W)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (W)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(a[0]) == 4) return (W)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (W)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(a[0]) == 4) return (W)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else return (W)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}
