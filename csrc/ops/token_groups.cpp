#include "ops/token_groups.h"

#include <algorithm>

#include "ops/offsets.h"
#include "python/parallel.h"

namespace lipcore {
namespace {

uint64_t mix(int64_t id) {
  const uint64_t x = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u;
  return x ^ x >> 32;
}

}  // namespace

void TokenGroups::make(const int64_t* ids, const int64_t* padding, Offsets packed, int64_t samples, int64_t length) {
  offsets.resize(static_cast<size_t>(samples + 1));
  for (int64_t b = 0; b <= samples; ++b) offsets[b] = packed.begin ? packed.begin[b] : b * length;
  const int64_t total = offsets[samples];
  rows.resize(static_cast<size_t>(total));
  starts.resize(static_cast<size_t>(total + samples));
  groups.resize(static_cast<size_t>(samples));
  parallel_for(samples, total >= kSerialElements / 8, [&](int64_t b) {
    static thread_local std::vector<int64_t> table, group_of;
    const int64_t begin = offsets[b], count = offsets[b + 1] - begin;
    size_t slots = 16;
    while (static_cast<int64_t>(slots) < 2 * count) slots *= 2;
    table.assign(slots, -1);  // the row in which a token appeared first
    group_of.resize(static_cast<size_t>(count));
    int64_t* start = &starts[begin + b];
    int64_t found = 0;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t id = ids[begin + t];
      if (padding && id == *padding) {
        group_of[t] = -1;
        continue;
      }
      size_t slot = mix(id) & (slots - 1);
      while (table[slot] >= 0 && ids[begin + table[slot]] != id) slot = (slot + 1) & (slots - 1);
      if (table[slot] < 0) {
        table[slot] = t;
        group_of[t] = found;
        start[found++] = 1;
      } else {
        ++start[group_of[t] = group_of[table[slot]]];
      }
    }
    groups[b] = found;
    int64_t at = begin;
    for (int64_t k = 0; k < found; ++k) {
      const int64_t size = start[k];
      start[k] = at;
      at += size;
    }
    for (int64_t t = 0; t < count; ++t)
      if (group_of[t] >= 0) rows[start[group_of[t]]++] = begin + t;
    // Every start has moved to its group's end, which is the next one's start.
    for (int64_t k = found; k > 0; --k) start[k] = start[k - 1];
    start[0] = begin;
  });
}

void cut_groups(const TokenGroups& groups, std::vector<GroupBlock>* blocks) {
  blocks->clear();
  for (int64_t b = 0; b < groups.samples(); ++b)
    for (int64_t k = 0; k < groups.groups[b]; k += kGroupBlock)
      blocks->push_back({b, k, std::min(groups.groups[b], k + kGroupBlock)});
}

}  // namespace lipcore
