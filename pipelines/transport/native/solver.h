// The assignment problem over candidate lists that are grown on demand.
//
// Each row lists the columns of its least reduced costs C[i][j] − v[j], and has a bound under the reduced costs of all
// the others. Column potentials only fall in the method of Jonker and Volgenant (1987), so that reduced costs only rise
// and a bound once true stays true. A row is read again in full only where its bound would decide: when its second
// minimum, or the length of the search from it, passes the bound. A listed cost is a bound too, what the screen says
// less the screen's error, until it would decide; then it is computed exactly. Hence every step is one that the dense
// method could take, and the bounds prove the potentials feasible over the whole matrix.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "potentials.h"

namespace monge {

constexpr double infinity = std::numeric_limits<double>::infinity();

// The exact costs, up to constants of the row and of the column.
struct Exact {
  const float* matrix;             // the screen holds the costs themselves, or null
  const double* table;             // costs in float64, of which the screen has lower bounds, or null
  const float *x, *y;              // points, (n, d), or null
  const double *x_wide, *y_wide;   // points in float64, or null
  std::int64_t n, d;
  double scale;                    // the entry is scale · ‖x − y‖² − row[i] − column[j]
  bool root;                       // or scale · ‖x − y‖
  const double *row, *column;      // null for zeros
  double rounding;                 // relative error of whole()

  // The cost with its constants.
  double whole(int i, int j) const {
    if (matrix) return matrix[i * n + j];
    if (table) return scale * table[i * n + j];
    const double squared = x ? squared_distance(x + i * d, y + j * d, d)
                             : squared_distance(x_wide + i * d, y_wide + j * d, d);
    return scale * (root ? std::sqrt(squared) : squared);
  }

  double operator()(int i, int j) const {
    const double cost = whole(i, j);
    return row ? cost - row[i] - column[j] : cost;
  }

  // How far an entry as computed can lie above the true one.
  double error(double entry, int i, int j) const {
    const double constants = row ? std::fabs(row[i]) + std::fabs(column[j]) : 0;
    return (rounding + 0x1p-51) * (std::fabs(entry) + 2 * constants);
  }

  // Candidates lie anywhere among the points: fetch the next while this one is computed.
  void prefetch(int j) const {
    if (!y) return;
    for (std::int64_t k = 0; k < d; k += 16) __builtin_prefetch(y + j * d + k);
  }
};

struct Counts {
  std::int64_t readings = 0;    // rows read in full
  std::int64_t bids = 0;        // of augmenting row reduction
  std::int64_t unassigned = 0;  // rows that it left
  std::int64_t pops = 0;        // columns scanned by Dijkstra's method
  std::int64_t computed = 0;    // exact entries
  std::int64_t looks = 0;       // at entries of lists, by the search
};

template <class Screen>
class Solver {
  using Stored = typename Screen::Stored;
  static constexpr int list_length = 16;
  static constexpr double look_ahead = 0.1;  // of a search, in distances between candidates
  static constexpr std::int64_t most_listed = 400;  // times n places, given up ones included: a limit of memory

  struct Row {
    std::int64_t first = 0;  // where its list starts in columns_, costs_ and known_
    int count = 0;
    float width = 0;         // of the window of reduced costs that the list holds
    double error = 0;        // of the screen in this row
    double bound = -infinity;
  };

  struct Best {
    double least, second;
    int at, second_at;  // places in the list; −1 where there is none
  };

 public:
  Counts counts;

  // error: for each row, how far the screen can lie above the exact entries; null for zero.
  // budget, looks: rows that may be read and entries that searches may look at before the solver gives up.
  // stop: it gives up when this is no longer 0.
  Solver(const Stored* screen, const Exact& exact, const double* error, const Potentials& start, std::int64_t budget,
         std::int64_t looks, const std::atomic<std::int32_t>& stop)
      : n_(static_cast<int>(exact.n)), screen_(screen), exact_(exact), width_(start.scale),
        window_(look_ahead * start.scale), stop_(stop), budget_(budget), look_budget_(looks),
        entry_budget_(affordable(exact.n, exact.d)), v_(start.v.begin(), start.v.end()), v_screen_(start.v), rows_(n_), column_of_(n_, -1), row_of_(n_, -1),
        matched_cost_(n_), reduced_(n_) {
    const std::int64_t expected = static_cast<std::int64_t>(n_) * std::min(n_, 2 * list_length);
    columns_.reserve(expected);
    costs_.reserve(expected);
    known_.reserve(expected);
    for (double v : v_) magnitude_ = std::max(magnitude_, std::fabs(v));
    for (int i = 0; i < n_; ++i) {
      rows_[i].error = (error ? error[i] : 0) + Screen::rounding(row(i), n_);
      width_ = std::max(width_, static_cast<float>(rows_[i].error));
    }
  }

  // False when stopped or when a budget ran out; or when costs given outright leave so many rows to the search that
  // dense shortest paths are the better method.
  bool run() {
    list_all_rows();
    reduce_rows();
    if ((exact_.matrix || exact_.table) && counts.unassigned > n_ / 4) return false;
    search_all();
    return !exhausted();
  }

  // f[i] ≤ C[i][j] − v[j] for every j and the true C: listed entries are looked at, less what rounding can have added;
  // the others lie above the bound. Nothing that the search believed goes in: a fault there shows as a duality gap.
  // matched: cost of each pair, constants included.
  void write(double* f, double* v, double* matched, std::int64_t* assignment) {
    for (int i = 0; i < n_; ++i) {
      const Row& r = rows_[i];
      const int mate = column_of_[i];
      assignment[i] = mate;
      matched[i] = exact_.whole(i, mate);
      v[i] = v_[i];
      f[i] = r.bound;
      consider(f[i], exact_(i, mate), i, mate);
      for (std::int64_t k = r.first; k < r.first + r.count; ++k) {
        const int j = columns_[k];
        if (costs_[k] - v_[j] < f[i]) compute(i, k);
        consider(f[i], costs_[k], i, j);
      }
    }
  }

 private:
  const Stored* row(int i) const { return screen_ + static_cast<std::int64_t>(i) * n_; }
  bool exhausted() const {
    return failed_ || counts.readings > budget_ || counts.looks > look_budget_ || counts.computed > entry_budget_ ||
           static_cast<std::int64_t>(columns_.size()) > most_listed * n_ || stop_.load(std::memory_order_relaxed);
  }

  // Exact entries that cost no more than a dense method would: of points, the more the fewer coordinates they have.
  static std::int64_t affordable(std::int64_t n, std::int64_t d) {
    return d == 0 ? 2 * n * n : std::max(200 * n, std::min(2 * n * n, 16 * n * n / d));
  }

  // Lower a row's potential to what an entry allows.
  void consider(double& f, double entry, int i, int j) const {
    const double reduced = entry - v_[j];
    f = std::min(f, reduced - exact_.error(entry, i, j) - 0x1p-51 * (std::fabs(reduced) + std::fabs(v_[j])));
  }

  // The cost at place k, which was a bound until now.
  void compute(int i, std::int64_t k) {
    if (known_[k]) return;
    ++counts.computed;
    costs_[k] = exact_(i, columns_[k]);
    known_[k] = 1;
  }

  void lower(int j, double value) {
    v_[j] = value;
    v_screen_[j] = static_cast<float>(value);
    magnitude_ = std::max(magnitude_, std::fabs(value));
  }

  void match(int i, int j, double cost) {
    row_of_[j] = i;
    column_of_[i] = j;
    matched_cost_[i] = cost;
  }

  // List row i anew: between wanted / 2 and 2 · wanted columns, where ties allow.
  void read(int i, float width, int wanted) {
    Row& r = rows_[i];
    ++counts.readings;
    if (wanted >= n_ / 2) {
      list(r, i, INFINITY, n_);
      r.bound = infinity;
      return;
    }
    const float least = reduce_row<Screen>(row(i), v_screen_.data(), n_, reduced_.data());
    float narrow = 0, wide = -1, threshold;
    int count;
    for (int tries = 0;; ++tries) {
      threshold = least + width;
      count = count_at_most(reduced_.data(), n_, threshold);
      if (count >= n_) break;
      if (count > 2 * wanted && tries < 8) {
        wide = width;
        width = narrow + (width - narrow) * 0.6f;
      } else if (count < wanted / 2 && (wide < 0 ? tries < 40 : tries < 8)) {
        narrow = width;
        width = wide < 0 ? width * 1.5f : (width + wide) / 2;
      } else {
        break;
      }
    }
    r.width = width;
    list(r, i, threshold, count);
    // Float32 rounded the potentials, and the difference with them.
    const double rounding = 0x1p-22 * (magnitude_ + std::fabs(threshold));
    r.bound = count >= n_ ? infinity : static_cast<double>(threshold) - r.error - rounding;
  }

  void list(Row& r, int i, float threshold, int count) {
    // What was computed once is kept: both lists are in the order of columns.
    kept_.clear();
    if (!exact_.matrix)
      for (std::int64_t k = r.first; k < r.first + r.count; ++k)
        if (known_[k]) kept_.emplace_back(costs_[k], columns_[k]);
    if (count > r.count) {  // a longer list goes to the end; its old place is given up
      r.first = static_cast<std::int64_t>(columns_.size());
      columns_.resize(r.first + count);
      costs_.resize(r.first + count);
      known_.resize(r.first + count);
    }
    r.count = count;
    std::int64_t k = r.first;
    auto kept = kept_.begin();
    const auto take = [&](int j) {
      columns_[k] = j;
      while (kept != kept_.end() && kept->second < j) ++kept;
      known_[k] = exact_.matrix || (kept != kept_.end() && kept->second == j);
      costs_[k] = known_[k] && !exact_.matrix ? kept->first : static_cast<double>(Screen::decode(row(i)[j])) - r.error;
      ++k;
    };
    if (count == n_) {
      for (int j = 0; j < n_; ++j) take(j);
    } else {
      collect_at_most(reduced_.data(), n_, threshold, take);
    }
  }

  void list_all_rows() {
    const int wanted = std::min(n_, list_length);
    for (int i = 0; i < n_ && !exhausted(); ++i) {
      read(i, width_, wanted);
      // The next row's window is a running mean, drawn towards lists of the wanted length.
      const float window = rows_[i].width * (rows_[i].count > wanted ? 0.97f : 1.03f);
      if (rows_[i].bound < infinity) width_ = 0.9f * width_ + 0.1f * window;
    }
  }

  Best two_least_listed(const Row& r) const {
    Best best{infinity, infinity, -1, -1};
    for (int k = 0; k < r.count; ++k) {
      const double value = costs_[r.first + k] - v_[columns_[r.first + k]];
      if (value >= best.second) continue;
      if (value < best.least) {
        best = {value, best.least, k, best.at};
      } else {
        best.second = value;
        best.second_at = k;
      }
    }
    return best;
  }

  // The two least reduced costs of row i over all columns; the second may be a bound unless it is to be exact.
  Best two_least(int i, bool exact_second) {
    for (bool again = false;;) {
      const Row& r = rows_[i];
      const Best best = two_least_listed(r);
      if (exhausted()) return best;
      if (best.second > r.bound) {
        if (again) {
          read(i, r.width * 2, std::min(n_, 2 * r.count + list_length));
        } else {
          read(i, width_, list_length);
        }
        again = true;
        continue;
      }
      const std::int64_t least = r.first + best.at, second = r.first + best.second_at;
      const bool more = exact_second && best.second_at >= 0 && !known_[second];
      if (known_[least] && !more) return best;
      if (more) exact_.prefetch(columns_[second]);
      compute(i, least);
      if (more) compute(i, second);
    }
  }

  // Rows take their least column where it is free; then rows without one bid for theirs, as in an auction.
  void reduce_rows() {
    std::vector<int> later;
    for (int i = 0; i < n_ && !exhausted(); ++i) {
      const Best best = two_least(i, false);
      const std::int64_t k = rows_[i].first + best.at;
      if (row_of_[columns_[k]] < 0) {
        match(i, columns_[k], costs_[k]);
      } else {
        free_.push_back(i);
      }
    }
    const std::int64_t most = 12 * static_cast<std::int64_t>(n_);
    while (!free_.empty() && counts.bids < most && !exhausted()) {
      later.clear();
      for (int start : free_) {
        for (int i = start; i >= 0;) {
          if (counts.bids >= most || exhausted()) {
            later.push_back(i);
            break;
          }
          i = bid(i, later);
        }
      }
      free_.swap(later);
    }
    counts.unassigned = static_cast<std::int64_t>(free_.size());
  }

  // Row i takes its least column. Returns the row that it displaced and that bids next; −1 for none, or when that row
  // waits in later because prices did not move.
  int bid(int i, std::vector<int>& later) {
    ++counts.bids;
    const Best best = two_least(i, true);
    int at = best.at;
    const bool strict = best.least < best.second;
    if (strict) {
      if (best.second < infinity) {
        const int j = columns_[rows_[i].first + at];
        lower(j, v_[j] - (best.second - best.least));
      }
    } else if (row_of_[columns_[rows_[i].first + at]] >= 0) {
      at = best.second_at;
    }
    const std::int64_t k = rows_[i].first + at;
    const int j = columns_[k], displaced = row_of_[j];
    match(i, j, costs_[k]);
    if (displaced < 0) return -1;
    column_of_[displaced] = -1;
    if (strict) return displaced;
    later.push_back(displaced);
    return -1;
  }

  // Shortest augmenting paths by Dijkstra's method. The heap holds columns, at their distance, and rows (as ~i), at the
  // distance up to which their steps were looked at. A row looks only a window ahead of the search, which mostly ends
  // before the rest of its list would come in.
  void search_all() {
    distance_.assign(n_, infinity);
    base_.assign(n_, 0);
    begun_.assign(n_, 0);
    before_.assign(n_, -1);
    before_cost_.assign(n_, 0);
    done_.assign(n_, 0);
    for (int start : free_) {
      if (exhausted()) return;
      search(start);
    }
  }

  void search(int start) {
    touched_.clear();
    scanned_.clear();
    heap_.clear();
    nearest_ = infinity;
    base_[start] = -two_least(start, false).least;
    begun_[start] = 0;
    relax(start, 0);
    while (!heap_.empty() && heap_.front().first < nearest_) {
      const auto [at, node] = pop();
      if (node < 0) {
        look_on(~node, at);
      } else if (!done_[node] && at <= distance_[node]) {
        ++counts.pops;
        done_[node] = 1;
        scanned_.push_back(node);
        const int i = row_of_[node];
        base_[i] = at - (matched_cost_[i] - v_[node]);
        begun_[i] = at;
        relax(i, at);
      }
      if (exhausted()) return;
    }
    if (nearest_ == infinity) {  // there is a free column, and it is nearer: only a fault leads here
      failed_ = true;
      return;
    }
    for (int j : scanned_) {
      lower(j, v_[j] + std::min(0.0, distance_[j] - nearest_));
      done_[j] = 0;
    }
    for (int j : touched_) distance_[j] = infinity;
    for (int j = end_, i = -1; i != start;) {
      i = before_[j];
      const int next = column_of_[i];
      match(i, j, before_cost_[j]);
      j = next;
    }
  }

  // Distances through row i to the columns on its list, as far as a window past those at which it was looked at. The
  // window doubles with each look, and is no less than rounding, so that looks are few whatever the costs.
  void relax(int i, double looked) {
    const Row& r = rows_[i];
    counts.looks += r.count;
    const double base = base_[i], rounding = 0x1p-48 * (std::fabs(looked) + std::fabs(base));
    const double end = std::min(looked + std::max({window_, looked - begun_[i], rounding}), base + r.bound);
    for (std::int64_t k = r.first; k < r.first + r.count; ++k) {
      const int j = columns_[k];
      double there = base + (costs_[k] - v_[j]);
      // A scanned column is settled, even where rounding would bring it nearer: the path back to it must not change.
      if (there > end || there >= nearest_ || there >= distance_[j] || done_[j]) continue;
      if (!known_[k]) {
        compute(i, k);
        there = base + (costs_[k] - v_[j]);
        if (there >= nearest_ || there >= distance_[j]) continue;
      }
      if (distance_[j] == infinity) touched_.push_back(j);
      distance_[j] = there;
      before_[j] = i;
      before_cost_[j] = costs_[k];
      if (row_of_[j] < 0) {
        nearest_ = there;
        end_ = j;
      } else {
        push(there, j);
      }
    }
    if (end < nearest_) push(end, ~i);
  }

  // The search has come to the end of what row i looked at: look further, on a longer list where this one ends here.
  void look_on(int i, double at) {
    const Row& r = rows_[i];
    while (base_[i] + r.bound <= at && !exhausted())
      read(i, r.width * 2 + static_cast<float>(r.error), std::min(n_, 2 * r.count + list_length / 2));
    relax(i, at);
  }

  using Node = std::pair<double, int>;

  void push(double at, int node) {
    heap_.emplace_back(at, node);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<Node>());
  }

  Node pop() {
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<Node>());
    const Node node = heap_.back();
    heap_.pop_back();
    return node;
  }

  const int n_;
  const Stored* screen_;
  const Exact exact_;
  float width_;          // of the window of reduced costs that the next list holds
  const double window_;  // of path lengths that a search looks at at once
  const std::atomic<std::int32_t>& stop_;
  const std::int64_t budget_, look_budget_, entry_budget_;
  double magnitude_ = 0;  // largest |v| so far
  std::vector<double> v_;
  std::vector<float> v_screen_;
  std::vector<Row> rows_;
  std::vector<int> column_of_, row_of_;
  std::vector<double> matched_cost_;
  std::vector<float> reduced_;
  std::vector<int> columns_;  // the lists, one after the other
  std::vector<double> costs_;         // exact where known, else bounds under the cost
  std::vector<char> known_;
  std::vector<std::pair<double, int>> kept_;
  std::vector<int> free_;
  // of one search
  std::vector<double> distance_, before_cost_;
  std::vector<double> base_, begun_;  // of rows: what paths through it add to reduced costs; where it was looked at first
  std::vector<int> before_;
  std::vector<char> done_;
  std::vector<int> touched_, scanned_;
  std::vector<Node> heap_;
  double nearest_ = infinity;
  bool failed_ = false;
  int end_ = -1;
};

}  // namespace monge
