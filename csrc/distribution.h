// The distribution of a stream of values >= 0: moments beside a quantile histogram, mergeable without loss. Memory is 2
// KiB and another KiB for every power of two the values touch.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "math/observed.h"

namespace lipcore {

// What is said of all values in a bin: its middle, but nothing below the least or above the greatest value.
inline double value_of_bin(int bin, const Moments& moments) {
  return std::fmin(std::fmax(bin_middle(bin), moments.min), moments.max);
}

class Distribution {
 public:
  // NaN means "no value" and is counted apart; infinite and negative values are counted apart too and enter nothing
  // else.
  void observe(double x);
  void merge(const Distribution& other);
  // The value below which a share q of the values lies, to half a bin (0.4 %); exact at q = 0 and 1. NaN when empty.
  double quantile(double q) const;
  // Pages that the values since the last reset have touched stay, empty; others are given back.
  void reset();

  const Moments& moments() const { return row_.moments; }
  int64_t missing() const { return static_cast<int64_t>(row_.missing); }  // NaN
  int64_t invalid() const { return static_cast<int64_t>(row_.invalid); }  // infinite or negative

  // The quantiles of a few values without the pages of a histogram: the same numbers as observing them all would give.
  // An infinite value counts as one that is larger than all others. `bins` is room for `count` numbers.
  static void quantiles(const double* values, int64_t count, const double* q, int64_t quantiles, int* bins, double* out,
                        int64_t stride);

  // State: six scalars (moments, missing, invalid ...) and the used bins as pairs.
  std::vector<int64_t> bins() const;  // bin, count, bin, count, ...
  bool set_state(const Moments& moments, int64_t missing, int64_t invalid, const std::vector<int64_t>& bins);

 private:
  using Page = std::array<int64_t, kBinsPerPage>;
  Page& page(int index);

  ObservedRow row_;
  int first_ = kPages, last_ = -1;  // no page lies outside: reading hundreds of distributions is reading their pages
  std::array<std::unique_ptr<Page>, kPages> pages_;
};

}  // namespace lipcore
