// The C interface. No exception leaves it; it holds no state, so that any number of threads may call it at once.
#include <atomic>
#include <new>

#include "points.h"
#include "solver.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Kind : std::int32_t { costs = 0, products = 1, bfloat16_products = 2 };
enum Status : std::int32_t { solved = 0, too_coarse = 1, out_of_budget = 2, out_of_memory = 3, stopped = 4 };

}  // namespace

// Mirrored in __init__.py; with any change here, raise the number there and in monge_interface.
struct Request {
  std::int64_t n, d;
  std::int32_t kind;         // of the screen
  std::int32_t root;         // the cost is the distance, not its square
  std::int32_t strict;       // give up when the screen's error passes the distance between candidates
  std::int32_t unused;
  const std::atomic<std::int32_t>* stop;  // give up when it is no longer 0
  const void* screen;        // (n, n)
  const double* error;       // (n,), or null
  const float *x, *y;        // (n, d), or null
  const double *x_wide, *y_wide;  // (n, d) in float64, or null
  const double* table;       // (n, n) costs in float64, or null; without any of them the screen holds the costs
  double rounding;           // relative error of an exact entry
  double scale;
  const double *row, *column;  // (n,), or null
  const float* start;        // (n,) column potentials to start from, or null
  std::int64_t budget;       // rows that may be read in full
  std::int64_t looks;        // entries of lists that searches may look at
  double *f, *g, *matched;   // (n,) out
  std::int64_t* assignment;  // (n,) out
  std::int64_t* counts;      // (6,) out
};

// Over a sample of the rows.
template <class Screen>
static double mean_error(const Request& q) {
  const auto* screen = static_cast<const typename Screen::Stored*>(q.screen);
  const std::int64_t stride = std::max<std::int64_t>(1, q.n / 32);
  double total = 0;
  int rows = 0;
  for (std::int64_t i = 0; i < q.n; i += stride, ++rows)
    total += (q.error ? q.error[i] : 0) + Screen::rounding(screen + i * q.n, static_cast<int>(q.n));
  return total / rows;
}

template <class Screen>
static Status run(const Request& q) {
  const auto* screen = static_cast<const typename Screen::Stored*>(q.screen);
  const int n = static_cast<int>(q.n);
  const auto potentials = monge::Sinkhorn<Screen>(screen, n, *q.stop).run(q.start);
  // Costs near the end of float32's range have no potentials in it.
  for (float v : potentials.v)
    if (!std::isfinite(v)) return too_coarse;
  if (q.strict && potentials.scale < mean_error<Screen>(q)) return too_coarse;
  const bool given = q.x || q.x_wide || q.table;
  const monge::Exact exact{given ? nullptr : static_cast<const float*>(q.screen), q.table, q.x, q.y, q.x_wide,
                           q.y_wide, q.n, q.d, q.scale, q.root != 0, q.row, q.column, q.rounding};
  monge::Solver<Screen> solver(screen, exact, q.error, potentials, q.budget, q.looks, *q.stop);
  const bool finished = solver.run();
  const std::int64_t counts[] = {solver.counts.readings, solver.counts.bids, solver.counts.unassigned,
                                 solver.counts.pops, solver.counts.computed, solver.counts.looks};
  std::copy(counts, counts + 6, q.counts);
  if (!finished) return *q.stop ? stopped : out_of_budget;
  solver.write(q.f, q.g, q.matched, q.assignment);
  return solved;
}

// Tells a build from other sources apart: an installation in place keeps its old build when the sources change.
EXPORT std::int64_t monge_interface() { return 4 * 65536 + static_cast<std::int64_t>(sizeof(Request)); }

EXPORT std::int32_t monge_assign(const Request* request) {
  try {
    switch (request->kind) {
      case costs: return run<monge::Costs>(*request);
      case products: return run<monge::Products>(*request);
      default: return run<monge::Bfloat16Products>(*request);
    }
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
}

EXPORT float monge_summarise(const float* x, std::int64_t n, std::int64_t d, double* mean) {
  return monge::summarise(x, n, d, mean);
}

template <class Number>
static void prepare_as(const Number* x, std::int64_t n, std::int64_t d, const double* mean, const double* other,
                       double scale, std::int32_t bfloat16, void* stored, double* norm, double* residual,
                       double* constant) {
  if (bfloat16)
    monge::prepare<monge::ToBfloat16>(x, n, d, mean, other, scale, static_cast<std::uint16_t*>(stored), norm, residual,
                                      constant);
  else
    monge::prepare<monge::ToFloat>(x, n, d, mean, other, scale, static_cast<float*>(stored), norm, residual, constant);
}

EXPORT void monge_prepare(const float* x, std::int64_t n, std::int64_t d, const double* mean, const double* other,
                          double scale, std::int32_t bfloat16, void* stored, double* norm, double* residual,
                          double* constant) {
  prepare_as(x, n, d, mean, other, scale, bfloat16, stored, norm, residual, constant);
}

EXPORT void monge_prepare_wide(const double* x, std::int64_t n, std::int64_t d, const double* mean,
                               const double* other, double scale, std::int32_t bfloat16, void* stored, double* norm,
                               double* residual, double* constant) {
  prepare_as(x, n, d, mean, other, scale, bfloat16, stored, norm, residual, constant);
}

// screen[i][j] = factor · ‖x[i] − y[j]‖², or factor · ‖x[i] − y[j]‖, in float32 from the differences: its error is
// relative to the distance itself, however far the points lie from their centre. transposed: y as (d, n).
template <class Number>
static void distances_as(const Number* x, const Number* transposed, std::int64_t n, std::int64_t d, float factor,
                         std::int32_t root, float* screen) {
  for (std::int64_t i = 0; i < n; ++i) {
    float* out = screen + i * n;
    std::fill(out, out + n, 0.0f);
    for (std::int64_t k = 0; k < d; ++k) {
      const Number coordinate = x[i * d + k];
      const Number* y = transposed + k * n;
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) {
        const float difference = static_cast<float>(coordinate - y[j]);
        out[j] += difference * difference;
      }
    }
    if (root) {
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) out[j] = std::sqrt(out[j]);
    }
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) out[j] *= factor;
  }
}

EXPORT void monge_distances(const float* x, const float* transposed, std::int64_t n, std::int64_t d, float factor,
                            std::int32_t root, float* screen) {
  distances_as(x, transposed, n, d, factor, root, screen);
}

EXPORT void monge_distances_wide(const double* x, const double* transposed, std::int64_t n, std::int64_t d,
                                 float factor, std::int32_t root, float* screen) {
  distances_as(x, transposed, n, d, factor, root, screen);
}

// Which instructions this processor has: 0 the baseline's, 1 AVX2 with FMA, 2 AVX-512, 3 AVX-512 with bfloat16.
EXPORT std::int32_t monge_processor() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
