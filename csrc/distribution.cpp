#include "distribution.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lipcore {

Distribution::Page& Distribution::page(int index) {
  if (!pages_[index]) {
    pages_[index] = std::make_unique<Page>(Page{});
    first_ = std::min(first_, index);
    last_ = std::max(last_, index);
  }
  return *pages_[index];
}

void Distribution::observe(double x) {
  const int bin = lipcore::observe(&row_, x);
  if (bin >= 0) ++page(bin / kBinsPerPage)[bin % kBinsPerPage];
}

void Distribution::merge(const Distribution& other) {
  lipcore::merge(&row_, other.row_);
  for (int p = other.first_; p <= other.last_; ++p) {
    if (!other.pages_[p]) continue;
    Page& mine = page(p);
    for (int i = 0; i < kBinsPerPage; ++i) mine[i] += (*other.pages_[p])[i];
  }
}

double Distribution::quantile(double q) const {
  if (row_.moments.count == 0) return std::numeric_limits<double>::quiet_NaN();
  // The rank of numpy's default rule, rounded to an observed value: interpolating inside a bin would claim more than
  // the bin knows.
  const double rank = q * (row_.moments.count - 1);
  if (rank <= 0) return row_.moments.min;
  if (rank >= row_.moments.count - 1) return row_.moments.max;
  const auto target = static_cast<int64_t>(std::floor(rank + 0.5));
  int64_t below = 0;
  for (int p = first_; p <= last_; ++p) {
    if (!pages_[p]) continue;
    for (int i = 0; i < kBinsPerPage; ++i) {
      below += (*pages_[p])[i];
      if (below > target) return value_of_bin(p * kBinsPerPage + i, row_.moments);
    }
  }
  return row_.moments.max;
}

void Distribution::quantiles(const double* values, int64_t count, const double* q, int64_t quantiles, int* bins,
                             double* out, int64_t stride) {
  int64_t used = 0, infinite = 0;
  Moments range;
  for (int64_t i = 0; i < count; ++i) {
    const double x = values[i];
    if (std::isnan(x)) continue;
    if (!(x >= 0) || std::isinf(x)) {
      ++infinite;
      continue;
    }
    range.min = used ? std::fmin(range.min, x) : x;
    range.max = used ? std::fmax(range.max, x) : x;
    bins[used++] = bin_of(x);
  }
  std::sort(bins, bins + used);
  for (int64_t k = 0; k < quantiles; ++k) {
    double& found = out[k * stride];
    double share = q[k];
    if (infinite) {
      const double rank = std::floor(share * static_cast<double>(used + infinite - 1) + 0.5);
      if (rank >= static_cast<double>(used)) {
        found = std::numeric_limits<double>::infinity();
        continue;
      }
      share = rank / static_cast<double>(std::max<int64_t>(used - 1, 1));
    }
    const double last = static_cast<double>(used - 1), rank = share * last;
    if (used == 0)
      found = std::numeric_limits<double>::quiet_NaN();
    else if (rank <= 0)
      found = range.min;
    else if (rank >= last)
      found = range.max;
    else
      found = value_of_bin(bins[static_cast<int64_t>(std::floor(rank + 0.5))], range);
  }
}

void Distribution::reset() {
  row_ = {};
  // The next window touches the same powers of two, and the hot path allocates nothing then. Those of windows long ago
  // would add up while values drift.
  const int first = first_, last = last_;
  first_ = kPages;
  last_ = -1;
  for (int p = first; p <= last; ++p) {
    if (!pages_[p]) continue;
    if (std::all_of(pages_[p]->begin(), pages_[p]->end(), [](int64_t count) { return count == 0; })) {
      pages_[p].reset();
      continue;
    }
    pages_[p]->fill(0);
    first_ = std::min(first_, p);
    last_ = p;
  }
}

std::vector<int64_t> Distribution::bins() const {
  std::vector<int64_t> out;
  for (int p = first_; p <= last_; ++p) {
    if (!pages_[p]) continue;
    for (int i = 0; i < kBinsPerPage; ++i) {
      if (const int64_t count = (*pages_[p])[i]) {
        out.push_back(p * kBinsPerPage + i);
        out.push_back(count);
      }
    }
  }
  return out;
}

bool Distribution::set_state(const Moments& moments, int64_t missing, int64_t invalid,
                             const std::vector<int64_t>& bins) {
  if (bins.size() % 2 || missing < 0 || invalid < 0 || !(moments.count >= 0)) return false;
  int64_t total = 0;
  for (size_t i = 0; i < bins.size(); i += 2) {
    if (bins[i] < 0 || bins[i] >= kBins || bins[i + 1] <= 0) return false;
    total += bins[i + 1];
  }
  if (static_cast<double>(total) != moments.count) return false;
  reset();
  row_ = {moments, static_cast<double>(missing), static_cast<double>(invalid)};
  for (size_t i = 0; i < bins.size(); i += 2) {
    const int bin = static_cast<int>(bins[i]);
    page(bin / kBinsPerPage)[bin % kBinsPerPage] = bins[i + 1];
  }
  return true;
}

}  // namespace lipcore
