// Collectives of a warp: whoever comes last gives every lane of the mask its answer.
#include <cstring>

#include "emulator/block.h"
#include "emulator/matrices.h"

namespace emulator {

namespace {

constexpr unsigned char kGarbage = 0xcb;  // from a lane that takes no part

int source_of(const Part& part, int lane) {
  switch (part.kind) {
    case Collective::kShuffle:
      return part.argument & (kWarp - 1);
    case Collective::kShuffleXor:
      return lane ^ part.argument;
    case Collective::kShuffleDown:
      return lane + part.argument < kWarp ? lane + part.argument : lane;
    case Collective::kShuffleUp:
      return lane >= part.argument ? lane - part.argument : lane;
    default:
      return lane;
  }
}

}  // namespace

Order& Block::order_of(int warp, unsigned mask) {
  MaskedOrder* entry = warps_[warp];
  while (entry->mask && entry->mask != mask && entry != &warps_[warp][kMasks - 1]) ++entry;
  entry->mask = mask;
  return entry->order;
}

// Whether all lanes of this thread's mask wait in the same collective.
bool Block::all_arrived(int thread) {
  const int first = thread / kWarp * kWarp;
  const Part& mine = threads_[thread].part;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mine.mask >> lane & 1u) || first + lane == thread) continue;
    if (first + lane >= count_ || threads_[first + lane].state == State::kDone) {
      finding("%s at %s:%d: the mask %08x names lane %d, which is not there or has left the kernel", name_of(mine.kind),
              base_name(mine.site.file), mine.site.line, mine.mask, lane);
      continue;
    }
    const GpuThread& other = threads_[first + lane];
    const Part& theirs = other.part;
    if (other.state != State::kInWarp || theirs.kind != mine.kind || theirs.mask != mine.mask ||
        theirs.bytes != mine.bytes)
      return false;
    if (theirs.site.line != mine.site.line)
      finding("%s: lanes of a warp meet at different places, %s:%d and %s:%d", name_of(mine.kind),
              base_name(mine.site.file), mine.site.line, base_name(theirs.site.file), theirs.site.line);
  }
  return true;
}

void Block::exchange(int first, unsigned mask) {
  const auto takes_part = [&](int lane) {
    return lane < kWarp && (mask >> lane & 1u) && first + lane < count_ && threads_[first + lane].state != State::kDone;
  };
  const Collective kind = threads_[first + __builtin_ctz(mask)].part.kind;
  if (kind == Collective::kMatrixProduct) return multiply_matrices(threads_ + first);
  if (kind == Collective::kLoad || kind == Collective::kLoadTransposed)
    return load_matrices(threads_ + first, kind == Collective::kLoadTransposed);
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (takes_part(lane) && threads_[first + lane].part.in[0]) ballot |= 1u << lane;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!takes_part(lane)) continue;
    Part& part = threads_[first + lane].part;
    const int from = source_of(part, lane);
    if (part.kind == Collective::kBallot)
      std::memcpy(part.out, &ballot, sizeof ballot);
    else if (takes_part(from))
      for (int i = 0; i < part.bytes; ++i) part.out[i] = threads_[first + from].part.in[i];
    else
      for (int i = 0; i < part.bytes; ++i) part.out[i] = kGarbage;
  }
}

bool Block::complete(int thread) {
  if (!all_arrived(thread)) return false;
  const int first = thread / kWarp * kWarp;
  const unsigned mask = threads_[thread].part.mask;
  exchange(first, mask);
  for (int lane = 0; lane < kWarp && first + lane < count_; ++lane)
    if ((mask >> lane & 1u) && threads_[first + lane].state == State::kInWarp)
      threads_[first + lane].state = State::kReady;
  return true;
}

}  // namespace emulator
