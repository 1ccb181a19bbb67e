// The fragment layouts are those of the PTX ISA's sections on ldmatrix and on mma.m16n8k16 with floating-point types.
#include "emulator/matrices.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace emulator {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;

float widened(uint16_t bits, bool bfloat16) {
  if (bfloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  static const float* const table = [] {
    auto* all = new float[1 << 16];
    for (int i = 0; i < 1 << 16; ++i) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      const float size = exponent == 31 ? (fraction ? std::numeric_limits<float>::quiet_NaN() : HUGE_VALF)
                                        : std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction),
                                                     exponent ? exponent - 25 : -24);
      all[i] = i >> 15 ? -size : size;
    }
    return all;
  }();
  return table[bits];
}

uint16_t half_of(uint32_t word, int half) { return static_cast<uint16_t>(word >> 16 * half); }

}  // namespace

void load_matrices(GpuThread* warp, bool transposed) {
  uint16_t all[4][8][8];
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(all[lane / 8][lane % 8], warp[lane].part.in, 16);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    uint16_t got[4][2];
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        got[i][half] = transposed ? all[i][column + half][row] : all[i][row][column + half];
    std::memcpy(warp[lane].part.out, got, sizeof got);
  }
}

void multiply_matrices(GpuThread* warp) {
  float a[kRows][kDepth], b[kDepth][kColumns], c[kRows][kColumns];
  for (int lane = 0; lane < kWarp; ++lane) {
    const bool bfloat16 = warp[lane].part.argument != 0;
    MatrixProduct mine;
    std::memcpy(&mine, warp[lane].part.in, sizeof mine);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = widened(half_of(mine.a[i], half), bfloat16);
      for (int i = 0; i < 2; ++i) b[pair + i * 8 + half][group] = widened(half_of(mine.b[i], half), bfloat16);
      for (int i = 0; i < 2; ++i) c[group + i * 8][pair + half] = mine.c[i * 2 + half];
    }
  }
  // Products are exact in float64, whose sum is rounded once. A GPU adds in an order of its own, and cuts digits off.
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      double sum = c[row][column];
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      c[row][column] = static_cast<float>(sum);
    }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    MatrixProduct result{};
    for (int i = 0; i < 4; ++i) result.c[i] = c[group + i / 2 * 8][pair + i % 2];
    std::memcpy(warp[lane].part.out, &result, sizeof result);
  }
}

}  // namespace emulator
