// Estimates of the gradient noise scale, step by step.
#pragma once

#include <vector>

#include "python/tensor_view.h"

namespace lipcore {

// Turns steps of the noise scale, pending[k] = [mean of the samples' squared gradient norms, squared norm of the mean
// gradient] in all places, into out[k] = [1, estimate of |G|^2, estimate of tr(Sigma)], zeros where a step is not
// usable, and lets ema [4, places] (total weight, both averages, steps) go on by them. Steps of the same number of
// samples, > 1.
bool noise_steps(const std::vector<TensorView>& pending, double samples, double decay, const TensorView& ema,
                 const TensorView& out);

}  // namespace lipcore
