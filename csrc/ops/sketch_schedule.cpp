#include "ops/sketch_schedule.h"

#include <algorithm>
#include <numeric>

namespace lipcore {
namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

SketchSchedule schedule_sketch(const std::vector<SketchItem>& items, int64_t task_elements, int64_t wave) {
  SketchSchedule schedule{};
  int64_t next_place = 0;
  std::vector<int64_t> order(items.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return items[a].row < items[b].row; });
  for (size_t first = 0, last = 0; first < order.size(); first = last) {
    const int64_t row = items[order[first]].row;
    int64_t total = 0;
    for (last = first; last < order.size() && items[order[last]].row == row; ++last) total += items[order[last]].count;
    const int64_t tasks = std::max<int64_t>((total + task_elements - 1) / task_elements, 1);
    const int64_t size = round_up((total + tasks - 1) / tasks, kSketchPair);
    int64_t room = 0;
    bool opens = true;
    for (size_t i = first; i < last; ++i) {
      const SketchItem& item = items[order[i]];
      for (int64_t begin = 0, count; begin < item.count; begin += count) {
        if (room <= 0) {
          const auto next = static_cast<int64_t>(schedule.pieces.size());
          if (static_cast<int64_t>(schedule.tasks.size()) % wave == 0) next_place = 0;
          schedule.tasks.push_back({row, next, next, opens ? -1 : next_place++});
          schedule.places = std::max(schedule.places, next_place);
          opens = false;
          room = size;
        }
        // Cut between pairs of groups, so that only a tensor's own ends are partial.
        const int64_t cut = round_up(item.first_index % kSketchPair + begin + room, kSketchPair);
        count = std::min(cut - item.first_index % kSketchPair, item.count) - begin;
        schedule.pieces.push_back({order[i], begin, count});
        ++schedule.tasks.back().last_piece;
        room -= count;
      }
    }
  }
  return schedule;
}

}  // namespace lipcore
