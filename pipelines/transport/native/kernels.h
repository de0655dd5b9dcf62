// Loops over one row of the screen. All are written for the compiler's vectoriser: the same text gives AVX-512, AVX2,
// SSE2 or NEON code, whichever the flags ask for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace monge {

// A screen gives a float32 number near each cost, up to constants of the row and of the column.
struct Costs {  // the cost itself
  using Stored = float;
  static float decode(float stored) { return stored; }
  static float rounding(const float*, int) { return 0; }
};

struct Products {  // inner products: −⟨x, y⟩ is half the squared distance but for ½‖x‖² + ½‖y‖²
  using Stored = float;
  static float decode(float stored) { return -stored; }
  static float rounding(const float*, int) { return 0; }
};

struct Bfloat16Products {  // the same, with the upper 16 bits of a float32 only
  using Stored = std::uint16_t;
  static float decode(std::uint16_t stored) {
    const std::uint32_t bits = (static_cast<std::uint32_t>(stored) << 16) ^ 0x80000000u;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // By how much storing a row of products in bfloat16 can have changed one: half a unit in the last of 8 places.
  static float rounding(const std::uint16_t* row, int n) {
    std::uint16_t largest = 0;  // without their sign, floats are ordered as their bits
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < n; ++j) {
      const std::uint16_t magnitude = row[j] & 0x7fff;
      largest = magnitude > largest ? magnitude : largest;
    }
    return std::fabs(decode(largest)) * 0x1p-8f;
  }
};

// 2^x to 2e-4, for x in [-120, 100]: the nearest integer goes to the exponent, the rest through a cubic.
inline float exp2_approximate(float x) {
  x = std::min(std::max(x, -120.0f), 100.0f);
  const float nearest = (x + 12582912.0f) - 12582912.0f;  // 1.5 · 2^23: the sum has no fractional bits left
  const float rest = x - nearest;
  const float mantissa = 1.0f + rest * (0.6931471805f + rest * (0.2402265069f + rest * 0.0555041086f));
  const std::int32_t bits = (static_cast<std::int32_t>(nearest) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return mantissa * power;
}

// reduced[j] = screen[j] − v[j]; returns the least.
template <class Screen>
float reduce_row(const typename Screen::Stored* row, const float* v, int n, float* reduced) {
  float least = INFINITY;
#pragma omp simd reduction(min : least)
  for (int j = 0; j < n; ++j) {
    const float value = Screen::decode(row[j]) - v[j];
    reduced[j] = value;
    least = value < least ? value : least;
  }
  return least;
}

// weights[j] = exp((shift − (screen[j] − v[j])) / epsilon); returns their sum.
template <class Screen>
float gibbs_row(const typename Screen::Stored* row, const float* v, int n, float shift, float epsilon, float* weights) {
  const float scale = 1.4426950408889634f / epsilon, top = shift * scale;
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int j = 0; j < n; ++j) {
    const float weight = exp2_approximate(top - (Screen::decode(row[j]) - v[j]) * scale);
    weights[j] = weight;
    total += weight;
  }
  return total;
}

inline void add_scaled(const float* weights, float scale, int n, float* sums) {
#pragma omp simd
  for (int j = 0; j < n; ++j) sums[j] += weights[j] * scale;
}

inline int count_at_most(const float* values, int n, float threshold) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int j = 0; j < n; ++j) count += values[j] <= threshold;
  return count;
}

// Indices of the values at most threshold, in order. Few are, so blocks without one are passed over whole.
template <class Take>
void collect_at_most(const float* values, int n, float threshold, Take take) {
  constexpr int block = 64;
  for (int start = 0; start < n; start += block) {
    const int stop = std::min(start + block, n);
    if (stop - start == block && count_at_most(values + start, block, threshold) == 0) continue;
    for (int j = start; j < stop; ++j)
      if (values[j] <= threshold) take(j);
  }
}

// ‖x − y‖² in float64: between float32 points the differences are exact. Several partial sums hide the latency of
// additions.
template <class Number>
double squared_distance(const Number* x, const Number* y, std::int64_t d) {
  constexpr int lanes = 32;
  double partial[lanes] = {};
  std::int64_t k = 0;
  for (; k + lanes <= d; k += lanes) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      const double difference = static_cast<double>(x[k + lane]) - static_cast<double>(y[k + lane]);
      partial[lane] += difference * difference;
    }
  }
  for (int lane = 0; k < d; ++k, ++lane) {
    const double difference = static_cast<double>(x[k]) - static_cast<double>(y[k]);
    partial[lane] += difference * difference;
  }
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int lane = 0; lane < lanes; ++lane) total += partial[lane];
  return total;
}

}  // namespace monge
