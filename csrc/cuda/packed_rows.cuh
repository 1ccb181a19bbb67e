// Where the rows of a sample lie: every sample has as many, or they are packed behind each other, with offsets that
// only the device knows.
#pragma once

#include "cuda/teams.cuh"

namespace lipcore::cuda {

struct RowRange {
  int64_t first, count;
};

// Rows of a sample: counted from its own first one, or, packed, from the first of all. Never outside of [0, rows),
// whatever the offsets say.
__device__ __forceinline__ RowRange rows_of_sample(int64_t sample, int64_t rows, const int64_t* offsets) {
  if (!offsets) return {0, rows};
  const int64_t first = offsets[sample], last = offsets[sample + 1];
  if (first < 0 || last > rows || first > last) return {0, 0};
  return {first, last - first};
}

// Whether offsets ascend from 0 to the number of rows. Nobody on the host can say so without waiting for the device;
// where they do not, every result is NaN. Called by all threads of the team, which all get the answer.
template <class Team>
__device__ bool offsets_ascend(int64_t samples, int64_t rows, const int64_t* offsets, Team team) {
  if (!offsets) return true;
  bool fine = offsets[0] == 0 && offsets[samples] == rows;
  for (int64_t b = team.rank(); b < samples; b += team.size()) fine = fine && offsets[b] <= offsets[b + 1];
  return team.max(fine ? 0.0 : 1.0) == 0.0;
}

}  // namespace lipcore::cuda
