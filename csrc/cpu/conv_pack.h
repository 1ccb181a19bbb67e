// Images and gradients of a convolution, read in any layout and dtype and written as the tiles want them. Included once
// by a kernel source after cpu/simd.h and cpu/conv_tile.h, inside its own namespace.

LIPCORE_INLINE void store_as(float* to, F32x16 a) { store(to, a); }
LIPCORE_INLINE void store_as(double* to, F32x16 a) { store(to, widen(a)); }
LIPCORE_INLINE void store_as(double* to, F64x16 a) { store(to, a); }
LIPCORE_INLINE void store_as(float* to, F64x16 a) {  // never called: float64 is worked on in float64
  double lanes[16];
  store(lanes, a);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(lanes[i]);
}

// to[i] = scale * from[i * stride]; the scale, a power of two, only counts in float64.
template <class E, class T>
LIPCORE_INLINE void read_line(E, const typename E::Stored* from, int64_t stride, int64_t count, double scale, T* to) {
  using Stored = typename E::Stored;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 16 <= count; i += 16) store_as(to + i, E::read(from + i));
  } else {
    for (; i + 16 <= count; i += 16) {
      Stored gathered[16];
      for (int k = 0; k < 16; ++k) gathered[k] = from[(i + k) * stride];
      store_as(to + i, E::read(gathered));
    }
  }
  if (i < count) {
    Stored tail[16] = {};
    T lanes[16];
    for (int64_t k = 0; i + k < count; ++k) tail[k] = from[(i + k) * stride];
    store_as(lanes, E::read(tail));
    for (int64_t k = 0; i + k < count; ++k) to[i + k] = lanes[k];
  }
  if (sizeof(T) == 8 && scale != 1)
    for (i = 0; i < count; ++i) to[i] *= static_cast<T>(scale);
}

// Four dimensions of memory, outermost first.
struct Box {
  int64_t size[4], from[4], to[4];  // strides in elements; to[3] is 1
};

// Merges inner dimensions that are one run of memory on both sides: a plane without padding is a single line.
LIPCORE_INLINE void merge_runs(Box* box) {
  for (int d = 2; d >= 0; --d) {
    if (box->size[d] == 1) continue;
    if (box->from[d] != box->from[3] * box->size[3] || box->to[d] != box->size[3]) return;
    box->size[3] *= box->size[d];
    box->size[d] = 1;
  }
}

template <class T>
void copy_box(Box box, const void* data, DType dtype, double scale, T* to) {
  merge_runs(&box);
  with_dtype(dtype, [&](auto element) {
    const auto* from = static_cast<const typename decltype(element)::Stored*>(data);
    for (int64_t a = 0; a < box.size[0]; ++a)
      for (int64_t b = 0; b < box.size[1]; ++b)
        for (int64_t c = 0; c < box.size[2]; ++c)
          read_line(element, from + a * box.from[0] + b * box.from[1] + c * box.from[2], box.from[3], box.size[3],
                    scale, to + a * box.to[0] + b * box.to[1] + c * box.to[2]);
  });
}

// The next multiple of 16 that is not one of 32: planes a power of two apart would share few sets of the cache.
LIPCORE_INLINE int64_t plane_pitch(int64_t count) {
  const int64_t lines = (count + 15) / 16;
  return 16 * (lines + (lines % 2 == 0));
}

// A padded image as a kernel reads it: strides of channel, depth, height and width.
struct Image {
  int64_t size[3];    // padding included
  int64_t stride[4];  // in elements
  bool interleaved;   // channels innermost, as in channels_last
};

LIPCORE_INLINE Image image_of(const ConvShape& shape, bool interleaved) {
  Image image;
  int64_t pixels = 1;
  for (int d = 0; d < 3; ++d) {
    image.size[d] = shape.size[d] + 2 * shape.padding[d];
    pixels *= image.size[d];
  }
  const int64_t step = interleaved ? shape.groups * shape.inputs : 1;
  image.stride[0] = interleaved ? 1 : plane_pitch(pixels);
  image.stride[3] = step;
  image.stride[2] = step * image.size[2];
  image.stride[1] = step * image.size[2] * image.size[1];
  image.interleaved = interleaved;
  return image;
}

LIPCORE_INLINE int64_t image_elements(const ConvShape& shape, const Image& image) {
  return image.interleaved ? image.stride[1] * image.size[0] : shape.groups * shape.inputs * image.stride[0];
}

template <class T>
void pack_image(const ConvShape& shape, const ConvSample& sample, const Image& image, T* to) {
  if (shape.padding[0] || shape.padding[1] || shape.padding[2])
    memset(to, 0, static_cast<size_t>(image_elements(shape, image)) * sizeof(T));
  Box box;
  for (int d = 0; d < 4; ++d) {
    // Channels come last where they are innermost.
    const int place = !image.interleaved ? d : d == 0 ? 3 : d - 1;
    box.size[place] = d == 0 ? shape.groups * shape.inputs : shape.size[d - 1];
    box.from[place] = sample.x_stride[d];
    box.to[place] = image.stride[d];
    if (d) to += shape.padding[d - 1] * image.stride[d];
  }
  copy_box(box, sample.x, sample.x_dtype, sample.x_scale, to);
}

// Channels [first, first + count) of the gradient as planes: to[channel * pitch + position].
template <class T>
void pack_planes(const ConvShape& shape, const ConvSample& sample, int64_t first, int64_t count, int64_t channel_step,
                 T* to, int64_t pitch) {
  const auto* data =
      static_cast<const char*>(sample.grad) + first * sample.grad_stride[0] * item_size(sample.grad_dtype);
  Box box = {
      {count, shape.out[0], shape.out[1], shape.out[2]},
      {sample.grad_stride[0] * channel_step, sample.grad_stride[1], sample.grad_stride[2], sample.grad_stride[3]},
      {pitch, shape.out[1] * shape.out[2], shape.out[2], 1}};
  copy_box(box, data, sample.grad_dtype, sample.grad_scale, to);
}

// True when the positions of a channel are one run of memory of the working type.
template <class T>
LIPCORE_INLINE bool grad_is_flat(const ConvShape& shape, const ConvSample& sample) {
  const int64_t* s = sample.grad_stride;
  const int64_t* n = shape.out;
  const DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  return sample.grad_dtype == dtype && sample.grad_scale == 1 && (n[2] == 1 || s[3] == 1) &&
         (n[1] == 1 || s[2] == n[2]) && (n[0] == 1 || s[1] == n[1] * n[2]);
}

// Channels first, first + channel_step, ... of the gradient as lanes: to[position * stride + channel], zero in the
// lanes from count to lanes. stage holds count planes.
template <class T>
void pack_lanes(const ConvShape& shape, const ConvSample& sample, int64_t first, int64_t count, int64_t channel_step,
                int64_t lanes, T* stage, T* to, int64_t stride) {
  const int64_t positions = shape.out[0] * shape.out[1] * shape.out[2];
  if (count < lanes)
    for (int64_t t = 0; t < positions; ++t)
      for (int64_t i = count; i < lanes; ++i) to[t * stride + i] = 0;
  if (sample.grad_stride[0] == 1 && channel_step == 1 && count > 1) {
    Box box = {{shape.out[0], shape.out[1], shape.out[2], count},
               {sample.grad_stride[1], sample.grad_stride[2], sample.grad_stride[3], 1},
               {shape.out[1] * shape.out[2] * stride, shape.out[2] * stride, stride, 1}};
    copy_box(box, static_cast<const char*>(sample.grad) + first * item_size(sample.grad_dtype), sample.grad_dtype,
             sample.grad_scale, to);
  } else if (grad_is_flat<T>(shape, sample)) {
    transpose(static_cast<const T*>(sample.grad) + first * sample.grad_stride[0], sample.grad_stride[0] * channel_step,
              count, positions, to, stride);
  } else {
    pack_planes(shape, sample, first, count, channel_step, stage, positions);
    transpose(static_cast<const T*>(stage), positions, count, positions, to, stride);
  }
}
