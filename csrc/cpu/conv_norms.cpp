// Squared norms of per-sample weight gradients of convolutions. Built once per instruction set.
// Float32 sums of at most 1024 products, float64 from there on: relative error about 1e-6 of the norm. Products are
// fused where the instruction set can; the same bits for any number of threads.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

#include "cpu/conv_tile.h"

#include "cpu/conv_pack.h"

LIPCORE_INLINE int64_t product(const int64_t* n) { return n[0] * n[1] * n[2]; }
LIPCORE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out pieces of the scratch memory, each on its own cache lines. Without memory it only counts.
struct Pieces {
  char* at;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = at ? reinterpret_cast<T*>(at + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// offsets[(z, y, x)] = z * step[0] + y * step[1] + x * step[2].
LIPCORE_INLINE void grid_offsets(const int64_t* size, const int64_t* step, int64_t* offsets) {
  for (int64_t z = 0; z < size[0]; ++z)
    for (int64_t y = 0; y < size[1]; ++y)
      for (int64_t x = 0; x < size[2]; ++x) *offsets++ = z * step[0] + y * step[1] + x * step[2];
}

LIPCORE_INLINE void steps(const Image& image, const int64_t* by, int64_t* step) {
  for (int d = 0; d < 3; ++d) step[d] = by[d] * image.stride[d + 1];
}

// Where the rows of the weight gradient (input channel and place in the kernel) begin, and how far each position of the
// output is from there.
struct Offsets {
  int64_t *rows, *positions, *taps;
};

LIPCORE_INLINE void fill_offsets(const ConvShape& shape, const Image& image, const Offsets& offsets) {
  int64_t step[3];
  steps(image, shape.stride, step);
  grid_offsets(shape.out, step, offsets.positions);
  steps(image, shape.dilation, step);
  grid_offsets(shape.kernel, step, offsets.taps);
  const int64_t taps = product(shape.kernel);
  // Neighbouring rows read neighbouring memory: that of one pixel where channels are innermost.
  for (int64_t c = 0; c < shape.inputs; ++c)
    for (int64_t k = 0; k < taps; ++k)
      offsets.rows[image.interleaved ? k * shape.inputs + c : c * taps + k] = c * image.stride[0] + offsets.taps[k];
}

double sum_of(const double* lanes, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += lanes[i];
  return sum;
}

// ---- direct: tiles of the weight gradient [rows of patches, outputs], squared as soon as they are complete

template <class T>
struct Direct {
  Image image;
  T *x, *grad, *stage;
  Offsets offsets;
};

template <class T>
Direct<T> lay_out_direct(const ConvShape& shape, bool interleaved, Pieces* pieces) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  Direct<T> d;
  const int64_t positions = product(shape.out), taps = product(shape.kernel);
  d.image = image_of(shape, interleaved);
  d.x = pieces->take<T>(image_elements(shape, d.image));
  d.grad = pieces->take<T>(round_up(shape.outputs, kLanes) * positions);
  d.stage = pieces->take<T>(kLanes * positions);
  d.offsets.rows = pieces->take<int64_t>(shape.inputs * taps);
  d.offsets.positions = pieces->take<int64_t>(positions);
  d.offsets.taps = pieces->take<int64_t>(taps);
  return d;
}

template <class T>
double direct_of(const ConvShape& shape, const ConvSample& sample, int64_t part, int64_t parts, void* scratch) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  Pieces pieces{static_cast<char*>(scratch)};
  const bool interleaved = sample.x_stride[0] == 1 && shape.groups * shape.inputs > 1 && shape.size[2] > 1;
  const Direct<T> d = lay_out_direct<T>(shape, interleaved, &pieces);
  pack_image(shape, sample, d.image, d.x);
  fill_offsets(shape, d.image, d.offsets);
  const int64_t positions = product(shape.out), rows = shape.inputs * product(shape.kernel);
  const Shares tiles = share_out(rows, kTileRows);
  const Shares panels = share_out((shape.outputs + kLanes - 1) / kLanes, kTileVectors);
  const int64_t first = part * tiles.count / parts, last = (part + 1) * tiles.count / parts;
  double sums[Vector<T>::kLanes] = {};
  for (int64_t group = 0; group < shape.groups; ++group) {
    const T* x = d.x + group * shape.inputs * d.image.stride[0];
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t begin = share_begin(panels, p), vectors = share_size(panels, p), width = vectors * kLanes;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t output = (begin + v) * kLanes, left = shape.outputs - output;
        pack_lanes(shape, sample, group * shape.outputs + output, left < kLanes ? left : kLanes, 1, kLanes, d.stage,
                   d.grad + v * kLanes, width);
      }
      for (int64_t i = first; i < last; ++i) {
        const int64_t* row_offsets = d.offsets.rows + share_begin(tiles, i);
        const int64_t count = share_size(tiles, i);
        const T* row[kTileRows];
        for (int64_t m = 0; m < count; ++m) row[m] = x + row_offsets[m];
        with_tile(count, vectors, [&](auto m, auto v) {
          square_tile<T, decltype(m)::value, decltype(v)::value>(positions, d.offsets.positions, row, d.grad, width,
                                                                 sums);
        });
      }
    }
  }
  return sum_of(sums, kLanes);
}

#include "cpu/conv_gram.h"

#include "cpu/conv_lanes.h"

void lanes(const ConvShape& shape, const ConvSample& sample, int64_t first, int64_t count, void* scratch,
           double* sums) {
  if (sample.in_float64) return lanes_of<double>(shape, sample, first, count, scratch, sums);
  lanes_of<float>(shape, sample, first, count, scratch, sums);
}

double gram(const ConvShape& shape, const ConvSample& sample, void* scratch, double* bound) {
  return sample.in_float64 ? gram_of<double>(shape, sample, scratch, bound)
                           : gram_of<float>(shape, sample, scratch, bound);
}

double direct(const ConvShape& shape, const ConvSample& sample, int64_t part, int64_t parts, void* scratch) {
  return sample.in_float64 ? direct_of<double>(shape, sample, part, parts, scratch)
                           : direct_of<float>(shape, sample, part, parts, scratch);
}

template <class T>
int64_t scratch_of(const ConvShape& shape, ConvMethod method) {
  Pieces pieces{nullptr}, interleaved{nullptr};
  if (method == ConvMethod::kGram) {
    lay_out_gram<T>(shape, &pieces);
  } else if (method == ConvMethod::kLanes) {
    lay_out_lanes<T>(shape, &pieces);
  } else {
    lay_out_direct<T>(shape, false, &pieces);
    lay_out_direct<T>(shape, true, &interleaved);
  }
  return pieces.used < interleaved.used ? interleaved.used : pieces.used;
}

int64_t scratch(const ConvShape& shape, bool in_float64, ConvMethod method) {
  return in_float64 ? scratch_of<double>(shape, method) : scratch_of<float>(shape, method);
}

}  // namespace

extern const ConvNormsKernels conv_norms;
const ConvNormsKernels conv_norms = {Vector<float>::kLanes, kTileRows, &scratch, &direct, &lanes, &gram};

}  // namespace lipcore::LIPCORE_ISA
