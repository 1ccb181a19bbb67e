// Gram: n^2 = sum over positions s, t of <patch_s, patch_t> <grad_s, grad_t>, where the first factor is a sum over the
// kernel's taps of shifted products of pixels, <x_p, x_q> with p = s stride + tap dilation: small maps with many
// channels need no patches at all. Included once by csrc/cpu/conv_norms.cpp.

template <class T>
struct Gram {
  Image image;  // without channels: where a pixel stands among the padded ones
  int64_t pixel_pitch, grad_pitch, row_pitch;
  T *x, *grad;  // [inputs, pixels], [outputs, positions]
  T* products;  // <x_p, x_q> [padded pixels, row_pitch], the lower triangle; 0 where p or q is padding
  T* weights;   // <grad_s, grad_t> [positions, row_pitch], t by its padded pixel, 2 below the diagonal, 0 above
  T* tile;
  char* inside;                                               // 0 for padding
  int64_t *pixels, *positions, *taps, *x_depth, *grad_depth;  // places among the padded pixels; steps between channels
};

template <class T>
Gram<T> lay_out_gram(const ConvShape& shape, Pieces* pieces) {
  constexpr int64_t kWide = Vector<T>::kLanes * kTileVectors;
  const int64_t pixels = product(shape.size), positions = product(shape.out);
  Gram<T> g;
  g.image = image_of({1,
                      1,
                      1,
                      {shape.size[0], shape.size[1], shape.size[2]},
                      {},
                      {},
                      {},
                      {shape.padding[0], shape.padding[1], shape.padding[2]},
                      {}},
                     false);
  const int64_t padded = product(g.image.size);
  g.pixel_pitch = round_up(pixels, Vector<T>::kLanes);
  g.grad_pitch = round_up(positions, Vector<T>::kLanes);
  g.row_pitch = round_up(padded, Vector<T>::kLanes) + Vector<T>::kLanes;
  g.x = pieces->take<T>(shape.groups * shape.inputs * g.pixel_pitch);
  g.grad = pieces->take<T>(shape.groups * shape.outputs * g.grad_pitch);
  g.products = pieces->take<T>(padded * g.row_pitch);
  g.weights = pieces->take<T>(positions * g.row_pitch);
  g.tile = pieces->take<T>(kTileRows * kWide);
  g.inside = pieces->take<char>(padded);
  g.pixels = pieces->take<int64_t>(pixels);
  g.positions = pieces->take<int64_t>(positions);
  g.taps = pieces->take<int64_t>(product(shape.kernel));
  g.x_depth = pieces->take<int64_t>(shape.inputs);
  g.grad_depth = pieces->take<int64_t>(shape.outputs);
  return g;
}

// The lower triangle of planes^T planes, each element handed to put(i, j, value), and some above the diagonal as well.
template <class T, class Put>
LIPCORE_INLINE void lower_products(const T* planes, int64_t pitch, int64_t count, int64_t channels,
                                   const int64_t* depth, T* tile, const Put& put) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  const Shares tiles = share_out(count, kTileRows);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t begin = share_begin(tiles, i), rows = share_size(tiles, i);
    const T* row[kTileRows];
    for (int64_t m = 0; m < rows; ++m) row[m] = planes + begin + m;
    const Shares panels = share_out((begin + rows + kLanes - 1) / kLanes, kTileVectors);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t first = share_begin(panels, p) * kLanes, vectors = share_size(panels, p);
      with_tile(rows, vectors, [&](auto m, auto v) {
        store_tile<T, decltype(m)::value, decltype(v)::value>(channels, depth, row, planes + first, pitch, tile,
                                                              vectors * kLanes);
      });
      const int64_t end = first + vectors * kLanes < count ? first + vectors * kLanes : count;
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = first; j < end; ++j) put(begin + m, j, tile[m * vectors * kLanes + j - first]);
    }
  }
}

// Products below the smallest float32 are lost, and the largest factor may be a weight or a product: in units of the
// bound, with room for many of them.
constexpr double kLost = 1e-25;

// sum_s sum_tap weights[s, :] . products[s + tap, tap + :]; adds the terms with s = t to *bound.
template <class T>
LIPCORE_INLINE double combine(const ConvShape& shape, const Gram<T>& g, double* bound) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  const int64_t positions = product(shape.out), taps = product(shape.kernel);
  double total = 0, largest = 0;
  for (int64_t s = 0; s < positions; ++s) {
    const int64_t place = g.positions[s];
    const T* weights = g.weights + s * g.row_pitch;
    Vector<T> sums[2] = {all_lanes(T(0)), all_lanes(T(0))};
    double diagonal = 0;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t pixel = place + g.taps[k];
      const T* products = g.products + pixel * g.row_pitch;
      if (!g.inside[pixel]) continue;
      diagonal += static_cast<double>(products[pixel]);
      products += g.taps[k];
      int64_t j = 0;
      for (; j + kLanes <= place; j += 2 * kLanes) {
        sums[0] = multiply_add(load_vector(weights + j), load_vector(products + j), sums[0]);
        sums[1] = multiply_add(load_vector(weights + j + kLanes), load_vector(products + j + kLanes), sums[1]);
      }
      if (j <= place) sums[0] = multiply_add(load_vector(weights + j), load_vector(products + j), sums[0]);
    }
    double lanes[Vector<T>::kLanes] = {};
    add_lanes(lanes, sums[0]);
    add_lanes(lanes, sums[1]);
    total += sum_of(lanes, kLanes);
    const double weight = static_cast<double>(weights[place]);
    *bound += diagonal * weight;
    largest = largest < diagonal ? diagonal : largest;
    largest = largest < weight ? weight : largest;
  }
  if (sizeof(T) == 4) *bound += kLost * largest;
  return total;
}

template <class T>
double gram_of(const ConvShape& shape, const ConvSample& sample, void* scratch, double* bound) {
  Pieces pieces{static_cast<char*>(scratch)};
  const Gram<T> g = lay_out_gram<T>(shape, &pieces);
  const int64_t pixels = product(shape.size), positions = product(shape.out), padded = product(g.image.size);
  int64_t step[3];
  steps(g.image, shape.stride, step);
  grid_offsets(shape.out, step, g.positions);
  steps(g.image, shape.dilation, step);
  grid_offsets(shape.kernel, step, g.taps);
  grid_offsets(shape.size, g.image.stride + 1, g.pixels);
  int64_t corner = 0;
  for (int d = 0; d < 3; ++d) corner += shape.padding[d] * g.image.stride[d + 1];
  for (int64_t p = 0; p < pixels; ++p) g.pixels[p] += corner;
  for (int64_t c = 0; c < shape.inputs; ++c) g.x_depth[c] = c * g.pixel_pitch;
  for (int64_t c = 0; c < shape.outputs; ++c) g.grad_depth[c] = c * g.grad_pitch;
  const Box box = {{shape.groups * shape.inputs, shape.size[0], shape.size[1], shape.size[2]},
                   {sample.x_stride[0], sample.x_stride[1], sample.x_stride[2], sample.x_stride[3]},
                   {g.pixel_pitch, shape.size[1] * shape.size[2], shape.size[2], 1}};
  copy_box(box, sample.x, sample.x_dtype, sample.x_scale, g.x);
  pack_planes(shape, sample, 0, shape.groups * shape.outputs, 1, g.grad, g.grad_pitch);
  // Lanes behind the last pixel are read and their products dropped; those behind the last plane would be foreign
  // memory.
  memset(g.products, 0, static_cast<size_t>(padded * g.row_pitch) * sizeof(T));
  memset(g.inside, 0, static_cast<size_t>(padded));
  for (int64_t p = 0; p < pixels; ++p) g.inside[g.pixels[p]] = 1;
  memset(g.weights, 0, static_cast<size_t>(positions * g.row_pitch) * sizeof(T));
  double total = 0;
  *bound = 0;
  for (int64_t group = 0; group < shape.groups; ++group) {
    lower_products(g.x + group * shape.inputs * g.pixel_pitch, g.pixel_pitch, pixels, shape.inputs, g.x_depth, g.tile,
                   [&](int64_t p, int64_t q, T value) { g.products[g.pixels[p] * g.row_pitch + g.pixels[q]] = value; });
    lower_products(g.grad + group * shape.outputs * g.grad_pitch, g.grad_pitch, positions, shape.outputs, g.grad_depth,
                   g.tile, [&](int64_t s, int64_t t, T value) {
                     g.weights[s * g.row_pitch + g.positions[t]] = t < s ? 2 * value : t == s ? value : T(0);
                   });
    total += combine(shape, g, bound);
  }
  return total;
}
