// What each file beside this one adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace lipcore {

void bind_hot_functions(pybind11::module_& m);  // called per step and layer, past pybind11's dispatcher
void bind_distribution(pybind11::module_& m);
void bind_tensor_stats(pybind11::module_& m);
void bind_trajectory(pybind11::module_& m);
void bind_per_sample(pybind11::module_& m);
void bind_single_sample(pybind11::module_& m);  // the Monitor's batches of one
void bind_single_batch(pybind11::module_& m);   // those of per-sample norms

}  // namespace lipcore
