// Column potentials to start from: a few annealed Sinkhorn passes, most of them over one row in eight.
#pragma once

#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace monge {

struct Potentials {
  std::vector<float> v;  // one for each column
  float scale;           // median distance from a row's least reduced cost to its 17th: how far candidates lie apart
};

template <class Screen>
class Sinkhorn {
  using Stored = typename Screen::Stored;
  static constexpr int sampled_rows = 24;
  static constexpr int coarse_passes = 8, fine_passes = 2;
  static constexpr int most_more = 12;  // pairs of passes between them
  static constexpr int neighbours = 16;
  static constexpr float relaxation = 1.4f;  // steps beyond Sinkhorn's own converge in fewer passes

 public:
  // stop: give up when it is no longer 0; the potentials are then good for nothing.
  Sinkhorn(const Stored* screen, int n, const std::atomic<std::int32_t>& stop)
      : screen_(screen), n_(n), stop_(stop), v_(n, 0.0f) {
    for (int k = 0, last = -1; k < sampled_rows; ++k) {
      const int row = static_cast<int>(static_cast<std::int64_t>(k) * (n - 1) / (sampled_rows - 1));
      if (row != last) sample_.push_back(row);
      last = row;
    }
  }

  // From nothing (start == nullptr); or the potentials of a problem like this one, as they are: passes would blur them.
  Potentials run(const float* start) {
    float top = 0;
    if (start) {
      v_.assign(start, start + n_);
    } else {
      const float spread = centre();
      const int stride = n_ >= 1024 ? 8 : std::max(1, std::min(8, n_ / 64));
      anneal(1.2f * spread, spread / 6, coarse_passes, stride);
      top = spread / 6;
    }
    float gap = candidate_gap();
    if (start) return {std::move(v_), gap};
    // Where candidates lie closer than the passes came, as they do when few large costs make the spread, go on.
    for (int more = 0; top > gap && more < most_more; ++more) {
      anneal(top, top / 3, 2, std::min(2, n_));
      top /= 3;
      gap = candidate_gap();
    }
    anneal(std::min(top, 0.35f * gap), std::min(top, 0.15f * gap), fine_passes, 1);
    return {std::move(v_), gap};
  }

 private:
  const Stored* row(int i) const { return screen_ + static_cast<std::int64_t>(i) * n_; }

  // Potentials to the mean of the sampled rows; returns the standard deviation about it.
  float centre() {
    std::vector<double> mean(n_, 0.0);
    for (int i : sample_)
      for (int j = 0; j < n_; ++j) mean[j] += Screen::decode(row(i)[j]) / static_cast<double>(sample_.size());
    double squares = 0, largest = 0, total = 0;
    for (int i : sample_)
      for (int j = 0; j < n_; ++j) {
        const double cost = Screen::decode(row(i)[j]), deviation = cost - mean[j];
        squares += deviation * deviation;
        total += deviation;
        largest = std::max(largest, std::fabs(cost));
      }
    const double count = static_cast<double>(sample_.size()) * n_;
    for (int j = 0; j < n_; ++j) v_[j] = static_cast<float>(mean[j]);
    return static_cast<float>(std::sqrt(std::max(0.0, squares / count - total / count * (total / count))) +
                              1e-6 * largest + 1e-30);
  }

  // Median over the sampled rows of the distance from the least reduced cost to the 17th, and not below the resolution
  // of float32 there.
  float candidate_gap() {
    const int k = std::min(neighbours, n_ / 4);
    std::vector<float> reduced(n_), gaps;
    float resolution = 1e-30f;
    for (int i : sample_) {
      const float least = reduce_row<Screen>(row(i), v_.data(), n_, reduced.data());
      const auto at = std::find(reduced.begin(), reduced.end(), least) - reduced.begin();
      resolution = std::max(resolution, 0x1p-21f * (std::fabs(Screen::decode(row(i)[at])) + std::fabs(v_[at])));
      std::nth_element(reduced.begin(), reduced.begin() + k, reduced.end());
      gaps.push_back(reduced[k] - least);
    }
    std::nth_element(gaps.begin(), gaps.begin() + gaps.size() / 2, gaps.end());
    return std::max(gaps[gaps.size() / 2], resolution);
  }

  void anneal(float from, float to, int passes, int stride) {
    std::vector<float> weights(n_), sums(n_);
    if (shift_.empty()) shift_.assign(n_, NAN);
    for (int pass = 0; pass < passes && !stop_.load(std::memory_order_relaxed); ++pass) {
      const float epsilon = from * std::pow(to / from, static_cast<float>(pass) / (passes - 1));
      const int offset = stride == 1 ? 0 : (5 * pass + 3) % stride;
      std::fill(sums.begin(), sums.end(), 0.0f);
      int rows = 0;
      for (int i = offset; i < n_; i += stride, ++rows) add_row(i, epsilon, weights.data(), sums.data());
      if (rows == 0) continue;
      const float target = static_cast<float>(rows) / n_;
      for (int j = 0; j < n_; ++j)
        v_[j] -= relaxation * epsilon * std::log(std::min(std::max(sums[j] / target, 1e-4f), 1e6f));
    }
  }

  // Adds row i of the plan, normalised to mass 1, to the columns' sums. The row's last soft minimum serves to keep the
  // exponentials in range; where it is too old, the least reduced cost does.
  void add_row(int i, float epsilon, float* weights, float* sums) {
    if (std::isnan(shift_[i])) shift_[i] = reduce_row<Screen>(row(i), v_.data(), n_, weights);
    float total = gibbs_row<Screen>(row(i), v_.data(), n_, shift_[i], epsilon, weights);
    if (!(total > 1e-24f && total < 1e26f)) {
      shift_[i] = reduce_row<Screen>(row(i), v_.data(), n_, weights);
      total = gibbs_row<Screen>(row(i), v_.data(), n_, shift_[i], epsilon, weights);
    }
    shift_[i] -= epsilon * std::log(total);
    add_scaled(weights, 1 / total, n_, sums);
  }

  const Stored* screen_;
  int n_;
  const std::atomic<std::int32_t>& stop_;
  std::vector<float> v_, shift_;
  std::vector<int> sample_;
};

}  // namespace monge
