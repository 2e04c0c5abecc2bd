// Compares products with matrices in fewer bits with plain loops, on random values. Prints the number of results, and
// returns 1 if one differs. FORMAT is defined by the caller.
using T = float;
#include "quantized_products.cpp"

#include <cstdio>
#include <vector>

namespace {

uint32_t state = 1;

float random_value() {
  state = state * 1664525u + 1013904223u;
  const float sign = state & 1 ? 1.f : -1.f, size = (float)(state >> 8) / (1 << 24);
  return state % 64 == 0 ? 0 : state % 61 == 0 ? sign * size * 1e-6f : sign * size;  // subnormal in float16, too
}

std::vector<float> random_values(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = random_value();
  return values;
}

float scale_of(const float* from, int64_t count, int64_t stride, bool with_17_bits) {
  float largest = 0;
  for (int64_t k = 0; k < count; k++) largest = std::max(largest, std::fabs(from[k * stride]));
  if (!with_17_bits || largest == 0) return largest / 127;
  int exponent;
  const double mantissa = std::frexp((double)(largest / 127), &exponent);
  return (float)std::ldexp(std::ceil(std::ldexp(mantissa, 17)), exponent - 17);
}

float expected_int8(const float* x, const float* w, int64_t depth, int64_t width) {
  const float row = scale_of(x, depth, 1, false), column = scale_of(w, depth, width, true);
  float largest = 0;
  for (int64_t k = 0; k < depth; k++) largest = std::max(largest, std::fabs(x[k]));
  int64_t sum = 0;
  for (int64_t k = 0; k < depth; k++)
    if (row > 0 && column > 0)
      sum += (int64_t)std::nearbyint(x[k] * (127 / largest)) * (int64_t)std::nearbyint(w[k * width] / column);
  return (float)sum * column * row;
}

float rounded_to_16_bits(float w) {
  if (FORMAT == FLOAT16) return (float)(_Float16)w;
  int exponent;
  const double mantissa = std::frexp((double)w, &exponent);
  return (float)std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

bool is_right(float found, const float* x, const float* w, int64_t depth, int64_t width) {
  if (FORMAT == INT8) return found == expected_int8(x, w, depth, width);
  double sum = 0, magnitude = 0;
  for (int64_t k = 0; k < depth; k++) {
    const double term = (double)x[k] * rounded_to_16_bits(w[k * width]);
    sum += term, magnitude += std::fabs(term);
  }
  return std::fabs(found - sum) <= 2e-6 * magnitude;
}

int checked = 0, wrong = 0;

void check(int rows, int strip, int64_t depth) {
  const QuantizedProducts& products = *quantized_products();
  const WeightFormat format = (WeightFormat)FORMAT;
  const int64_t width = strip * L - 1, stride = row_stride(format, depth);
  const std::vector<float> x = random_values(rows * depth), w = random_values(depth * width);
  std::vector<float> packed(packed_lines(format, depth) * strip * L), quantized(rows * stride);
  for (int s = 0; s < strip; s++)
    products.pack(&packed[s * L], strip, {w.data(), width, 1}, depth, s * L, width);
  if (format == INT8)
    for (int r = 0; r < rows; r++) products.quantize(&x[r * depth], depth, 0, &quantized[r * stride]);
  V sums[MAX_ROWS * MAX_STRIP];
  const float* const from = format == INT8 ? quantized.data() : x.data();
  products.tiles[rows - 1][strip - 1](from, stride, 1, packed.data(), depth, false, sums);
  for (int r = 0; r < rows; r++)
    for (int64_t column = 0; column < width; column++, checked++)
      if (!is_right(sums[r * strip + column / L][column % L], &x[r * depth], &w[column], depth, width)) wrong++;
}

}  // namespace

int main() {
  for (int strip = 1; strip <= MAX_STRIP; strip++)
    for (int rows = 1; rows <= rows_of(strip); rows++)
      for (int64_t depth : {1, 2, 3, 4, 15, 16, 31, 32, 33, 100}) check(rows, strip, depth);
  std::printf("%d results, %d wrong\n", checked, wrong);
  return wrong != 0;
}
