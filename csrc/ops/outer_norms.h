// Norms of gradients that are outer products, of many layers at once.
#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

// out[0, l, b] = ||x_l[b]||^2 ||grad_l[b]||^2, and out[1, l, b] = ||grad_l[b]||^2 where out has two slices; out
// float64 [1 or 2, layers, B].
bool outer_norms(const std::vector<TensorView>& x, const std::vector<TensorView>& grad, const TensorView& out);

}  // namespace lipcore
