// The CUDA twins of csrc/ops/{square_sums,update_sums,fold_means}.h: tensors in, sums on the same device. Nothing is
// waited for and nothing kept between calls.
#pragma once

#include <vector>

#include "cuda/kernels.h"
#include "ops/fold_means.h"
#include "ops/update_sums.h"
#include "python/tensor_view.h"

namespace lipcore::cuda {

// All on `device`, at least one; an empty tensor adds a row of zeros.
bool square_sums(const std::vector<TensorView>& tensors, dlpack::Device device, StepSums* rows);

bool update_sums(const std::vector<UpdateItem>& items, dlpack::Device device, StepSums* rows, double* squares);

bool observe_squares(const double* squares, int64_t columns, dlpack::Device device, double* table);

bool fold_means(const BlockMeans& block, const std::vector<TensorView>& earlier, dlpack::Device device,
                const double* share, double* gap_sq);

}  // namespace lipcore::cuda
