// Distributions whose numbers lie in tensors: many places at once, on a device or not.
#pragma once

#include "math/observed.h"
#include "python/tensor_view.h"

namespace lipcore {

// Observes row k of `values` at place k: rows float64 [places, kObservedColumns] and bins int64 [places, kBins] are
// what an ObservedRow and a histogram hold, and all lie on one device. `gradient` is asked for by ratios alone; null
// for none. False with a Python exception set.
bool observe_rows(const TensorView& values, Observable what, const TensorView* gradient, double smallest,
                  const TensorView& rows, const TensorView& bins);

}  // namespace lipcore
