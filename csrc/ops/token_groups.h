// The rows of every sample grouped by token: a hash per sample, groups in the order in which tokens first appear.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/offsets.h"

namespace lipcore {

struct TokenGroups {
  std::vector<int64_t> rows;     // of each sample in turn, grouped, in ascending order within a group
  std::vector<int64_t> starts;   // of groups in `rows`; one more than a sample has groups, at begin(b) + b
  std::vector<int64_t> groups;   // per sample: how many
  std::vector<int64_t> offsets;  // per sample: its first row; one more at the end

  int64_t samples() const { return static_cast<int64_t>(groups.size()); }
  // Group k of sample b: positions [first, last) of `rows`.
  int64_t first(int64_t b, int64_t k) const { return starts[offsets[b] + b + k]; }
  int64_t last(int64_t b, int64_t k) const { return first(b, k + 1); }

  // ids: flat, all samples behind each other; rows whose id is *padding are left out.
  void make(const int64_t* ids, const int64_t* padding, Offsets packed, int64_t samples, int64_t length);
};

// A run of at most kGroupBlock groups of one sample: the unit of work, cut by the tokens alone.
constexpr int64_t kGroupBlock = 64;
struct GroupBlock {
  int64_t sample, begin, end;
};
void cut_groups(const TokenGroups& groups, std::vector<GroupBlock>* blocks);

}  // namespace lipcore
