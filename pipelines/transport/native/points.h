// Points made ready for a matrix product: centred, scaled, rounded, with what the rounding changed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace monge {

struct ToFloat {
  using Stored = float;
  static float store(float value) { return value; }
  static float load(float stored) { return stored; }
};

struct ToBfloat16 {
  using Stored = std::uint16_t;
  static std::uint16_t store(float value) {  // to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static float load(std::uint16_t stored) {
    const std::uint32_t bits = static_cast<std::uint32_t>(stored) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// mean: (d,) out. Returns the largest coordinate in absolute value.
inline float summarise(const float* x, std::int64_t n, std::int64_t d, double* mean) {
  float largest = 0;
  for (std::int64_t k = 0; k < d; ++k) mean[k] = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float* row = x + i * d;
#pragma omp simd reduction(max : largest)
    for (std::int64_t k = 0; k < d; ++k) {
      const float magnitude = std::fabs(row[k]);
      mean[k] += row[k];
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  for (std::int64_t k = 0; k < d; ++k) mean[k] /= static_cast<double>(n);
  return largest;
}

// stored[i] ≈ scale · (x[i] − mean). norm[i] is the length of the right side, residual[i] of the difference of both;
// constant[i] = ½ scale² ‖x[i] − other‖², other being the mean of the other set.
template <class Format, class Number>
void prepare(const Number* x, std::int64_t n, std::int64_t d, const double* mean, const double* other, double scale,
             typename Format::Stored* stored, double* norm, double* residual, double* constant) {
  for (std::int64_t i = 0; i < n; ++i) {
    const Number* row = x + i * d;
    auto* out = stored + i * d;
    double squares = 0, changed = 0, across = 0;
#pragma omp simd reduction(+ : squares, changed, across)
    for (std::int64_t k = 0; k < d; ++k) {
      const double centred = (row[k] - mean[k]) * scale, beside = (row[k] - other[k]) * scale;
      const auto rounded = Format::store(static_cast<float>(centred));
      const double change = centred - static_cast<double>(Format::load(rounded));
      out[k] = rounded;
      squares += centred * centred;
      changed += change * change;
      across += beside * beside;
    }
    norm[i] = std::sqrt(squares);
    residual[i] = std::sqrt(changed);
    constant[i] = across / 2;
  }
}

}  // namespace monge
