// Where an element goes in a CountSketch: a bucket and a sign, from its global index and the seed. Host and device.
//
// Sixteen consecutive elements (a group, index / 16) share 32 hashed bits h: element j of the group goes to bucket
// ((h >> 16) mod buckets) ^ j with the sign of bit j. So the group fills sixteen neighbouring buckets, in an order
// permuted by XOR: two elements of a group never meet, two others meet with probability 1 / buckets, as in the textbook
// sketch, while a kernel moves whole vectors. The tempting shortcuts, bucket = index mod buckets or groups that are not
// permuted, keep a hot column of a matrix in few buckets: errors 3 and 28 times wider.
#pragma once

#include "math/dtype.h"

namespace lipcore {

constexpr int64_t kSketchGroup = 16;
constexpr int64_t kSketchPair = 2 * kSketchGroup;  // elements whose places come from one 64-bit hash
constexpr int64_t kMinBuckets = 256;
constexpr int64_t kMaxBuckets = 65536;  // sixteen hashed bits choose the bucket

constexpr uint64_t kSketchStep = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio, odd: the counter of splitmix64

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection whose every output bit depends on every input bit.
LIPCORE_INLINE uint64_t mix_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Mixed before it is used: seeds 0 and 1 as they are would give the same hashes one pair apart.
LIPCORE_INLINE uint64_t sketch_key(uint64_t seed) { return mix_bits(seed + kSketchStep); }

// h of elements 32 pair ... 32 pair + 15 in the low half, of the sixteen after them in the high half.
LIPCORE_INLINE uint64_t sketch_bits(uint64_t key, int64_t pair) {
  return mix_bits(key + static_cast<uint64_t>(pair) * kSketchStep);
}

// The first of the group's sixteen buckets, the XOR that permutes them, and the sign bits.
LIPCORE_INLINE uint32_t first_bucket(uint32_t h, int64_t buckets) {
  return (h >> 16) & static_cast<uint32_t>(buckets - kSketchGroup);
}
LIPCORE_INLINE uint32_t bucket_xor(uint32_t h) { return h >> 16 & 15u; }
LIPCORE_INLINE uint32_t sign_bits(uint32_t h) { return h & 0xffffu; }

}  // namespace lipcore
