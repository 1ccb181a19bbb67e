// Lanes: few outputs per group would leave most lanes of a vector empty (a depthwise convolution has one), so here the
// lanes are groups, of as many samples as it takes to fill them. Included once by csrc/cpu/conv_norms.cpp.

template <class T>
struct Lanes {
  Image image;
  int64_t pixels, positions;
  T *x, *grad, *stage;  // [inputs, pixels, lanes], [outputs, positions, lanes], one plane per lane
  Offsets offsets;
};

template <class T>
Lanes<T> lay_out_lanes(const ConvShape& shape, Pieces* pieces) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  Lanes<T> l;
  l.image = image_of(shape, false);
  l.pixels = product(l.image.size);
  l.positions = product(shape.out);
  const int64_t taps = product(shape.kernel);
  l.x = pieces->take<T>(shape.inputs * l.pixels * kLanes);
  l.grad = pieces->take<T>(shape.outputs * l.positions * kLanes);
  l.stage = pieces->take<T>(kLanes * (l.pixels < l.positions ? l.positions : l.pixels));
  l.offsets.rows = pieces->take<int64_t>(shape.inputs * taps);
  l.offsets.positions = pieces->take<int64_t>(l.positions);
  l.offsets.taps = pieces->take<int64_t>(taps);
  return l;
}

// c[m][v] += rows[m][offset] * columns[v], lane by lane, and the squares of the sums added to squares[lane].
template <class T, int kRows, int kColumns>
void square_lanes(int64_t depth, const int64_t* offsets, const T* const* rows, const T* columns, int64_t column_step,
                  double* squares) {
  constexpr int kLanes = Vector<T>::kLanes;
  double whole[kRows * kColumns * kLanes];
  if (depth > kPiece) memset(whole, 0, sizeof whole);
  for (int64_t begin = 0; begin < depth; begin += kPiece) {
    const int64_t end = depth - begin < kPiece ? depth : begin + kPiece;
    Vector<T> c[kRows][kColumns];
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kColumns; ++v) c[m][v] = all_lanes(T(0));
    for (int64_t k = begin; k < end; ++k) {
      Vector<T> column[kColumns];
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) column[v] = load_vector(columns + v * column_step + k * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vector<T> x = load_vector(rows[m] + offsets[k]);
#pragma GCC unroll 4
        for (int v = 0; v < kColumns; ++v) c[m][v] = multiply_add(x, column[v], c[m][v]);
      }
    }
    if (depth <= kPiece) {
      Vector<T> sum = all_lanes(T(0));
      for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kColumns; ++v) sum = multiply_add(c[m][v], c[m][v], sum);
      return add_lanes(squares, sum);
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kColumns; ++v) add_lanes(whole + (m * kColumns + v) * kLanes, c[m][v]);
  }
  if (depth <= kPiece) return;
  for (int i = 0; i < kRows * kColumns * kLanes; ++i) squares[i % kLanes] += whole[i] * whole[i];
}

// One channel of `count` units as lanes: to[pixel * lanes + unit], pixels of the padded image; 0 in the other lanes.
// Unit u is group u % groups of sample u / groups.
template <class T>
LIPCORE_INLINE void gather_lanes(const ConvShape& shape, const void* data, DType dtype, double scale,
                                 const int64_t* size, const int64_t* stride, int64_t sample_step, int64_t channels,
                                 int64_t channel, const Image& image, int64_t corner, int64_t first, int64_t count,
                                 T* stage, T* to) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  const int64_t pixels = product(image.size), bytes = item_size(dtype);
  const auto* from = static_cast<const char*>(data);
  const auto at = [&](int64_t unit) {
    return from + (unit / shape.groups * sample_step + (unit % shape.groups * channels + channel) * stride[0]) * bytes;
  };
  const bool whole = product(size) == pixels;
  if (stride[0] * channels == 1 && (first + count - 1) / shape.groups == first / shape.groups) {
    if (!whole || count < kLanes) memset(to, 0, static_cast<size_t>(pixels * kLanes) * sizeof(T));
    const Box box = {{size[0], size[1], size[2], count},
                     {stride[1], stride[2], stride[3], 1},
                     {image.stride[1] * kLanes, image.stride[2] * kLanes, image.stride[3] * kLanes, 1}};
    return copy_box(box, at(first), dtype, scale, to + corner * kLanes);
  }
  if (!whole || count < kLanes) memset(stage, 0, static_cast<size_t>(pixels * kLanes) * sizeof(T));
  for (int64_t u = 0; u < count; ++u) {
    const Box box = {{1, size[0], size[1], size[2]},
                     {0, stride[1], stride[2], stride[3]},
                     {pixels, image.stride[1], image.stride[2], 1}};
    copy_box(box, at(first + u), dtype, scale, stage + u * pixels + corner);
  }
  transpose(static_cast<const T*>(stage), pixels, kLanes, pixels, to, kLanes);
}

template <class T>
void lanes_of(const ConvShape& shape, const ConvSample& sample, int64_t first, int64_t count, void* scratch,
              double* sums) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  Pieces pieces{static_cast<char*>(scratch)};
  const Lanes<T> l = lay_out_lanes<T>(shape, &pieces);
  int64_t corner = 0;
  for (int d = 0; d < 3; ++d) corner += shape.padding[d] * l.image.stride[d + 1];
  for (int64_t i = 0; i < shape.inputs; ++i)
    gather_lanes(shape, sample.x, sample.x_dtype, sample.x_scale, shape.size, sample.x_stride, sample.x_step,
                 shape.inputs, i, l.image, corner, first, count, l.stage, l.x + i * l.pixels * kLanes);
  const Image out = {
      {shape.out[0], shape.out[1], shape.out[2]}, {0, shape.out[1] * shape.out[2], shape.out[2], 1}, false};
  for (int64_t o = 0; o < shape.outputs; ++o)
    gather_lanes(shape, sample.grad, sample.grad_dtype, sample.grad_scale, shape.out, sample.grad_stride,
                 sample.grad_step, shape.outputs, o, out, 0, first, count, l.stage, l.grad + o * l.positions * kLanes);
  Image vectors = l.image;  // a pixel is a vector now
  vectors.stride[0] = l.pixels * kLanes;
  for (int d = 1; d < 4; ++d) vectors.stride[d] *= kLanes;
  fill_offsets(shape, vectors, l.offsets);
  const int64_t rows = shape.inputs * product(shape.kernel);
  const Shares tiles = share_out(rows, kTileRows), panels = share_out(shape.outputs, kTileVectors);
  double squares[Vector<T>::kLanes] = {};
  for (int64_t p = 0; p < panels.count; ++p)
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t* row_offsets = l.offsets.rows + share_begin(tiles, i);
      const T* row[kTileRows];
      for (int64_t m = 0; m < share_size(tiles, i); ++m) row[m] = l.x + row_offsets[m];
      with_tile(share_size(tiles, i), share_size(panels, p), [&](auto m, auto v) {
        square_lanes<T, decltype(m)::value, decltype(v)::value>(l.positions, l.offsets.positions, row,
                                                                l.grad + share_begin(panels, p) * l.positions * kLanes,
                                                                l.positions * kLanes, squares);
      });
    }
  for (int64_t u = 0; u < count; ++u) sums[u] = squares[u];
}
