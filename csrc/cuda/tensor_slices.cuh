// Sums over many tensors in few launches: as many tensors as fit into a kernel's parameters make a slice, and a launch
// has a block for every chunk of a slice's tensors. One more launch adds up the chunks of all tensors, in their order.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/common.cuh"

namespace lipcore::cuda {

constexpr int64_t kParameterBytes = 4096;  // those that every driver takes

struct SliceHead {
  int64_t first_chunk, first_tensor;
  int64_t tensors;
};

template <class Tables, class Tensor>
constexpr int kSliceTensors = (kParameterBytes - sizeof(Tables) - sizeof(SliceHead)) / sizeof(Tensor);

template <class Tables, class Tensor>
struct Slice {
  SliceHead head;
  Tensor tensors[kSliceTensors<Tables, Tensor>];
};

// The chunk of a slice that a block works on; tensors have a count and a first_chunk.
struct SliceChunk {
  int64_t index;  // among the chunks of all tensors
  int place;      // of its tensor in the slice
  int64_t begin;  // of its elements
  int count;

  template <class Tensor>
  __device__ SliceChunk(const SliceHead& head, const Tensor* tensors) {
    index = head.first_chunk + blockIdx.x;
    place = static_cast<int>(holder_of(tensors, head.tensors, index));
    begin = (index - tensors[place].first_chunk) * kCudaChunk;
    const int64_t left = tensors[place].count - begin;
    count = static_cast<int>(left < kCudaChunk ? left : kCudaChunk);
  }

  // `elements` is that of ChunkSpan.
  template <class Tensor>
  __device__ void write_span(ChunkSpan* spans, const SliceHead& head, const Tensor* tensors, double elements) const {
    if (threadIdx.x != 0 || begin != 0) return;
    const Tensor& tensor = tensors[place];
    spans[head.first_tensor + place] = {tensor.first_chunk, chunks_of(tensor.count), elements};
  }
};

// This thread's share of the sum over a tensor's chunks.
template <class Sums, class Add>
__device__ __forceinline__ Sums add_chunks(const Sums* partials, const ChunkSpan& span, const Add& add) {
  Sums sums{};
  for (int64_t i = threadIdx.x; i < span.count; i += kThreads) sums = add(sums, partials[span.first + i]);
  return sums;
}

// Elements that a thread takes at a time: as many of every dtype, so that no sum depends on it.
constexpr int kGroup = 4;

// A group, or half of it.
template <bool kAligned, Keep kKeep, class T, int kCount>
__device__ __forceinline__ void load_lanes(const T* from, T (&lanes)[kCount]) {
  if constexpr (kAligned) {
    using Word = std::conditional_t<sizeof lanes == sizeof(uint2), uint2, uint4>;
    constexpr int kWords = static_cast<int>(sizeof lanes / sizeof(Word));
    Word words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const Word* word = reinterpret_cast<const Word*>(from) + i;
      words[i] = kKeep == Keep::kStream ? __ldcs(word) : *word;
    }
    memcpy(lanes, words, sizeof lanes);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) lanes[i] = from[i];
  }
}

// A slice's number of chunks, from its last tensor.
template <class Tensor>
int64_t chunks_in(const SliceHead& head, const Tensor& last) {
  return last.first_chunk + chunks_of(last.count) - head.first_chunk;
}

template <class Tables, class Tensor>
Status launch_slices(const char* doing, void (*kernel)(Tables, Slice<Tables, Tensor>), const Tables& tables,
                     const std::vector<Tensor>& tensors, void* stream) {
  static_assert(sizeof(Tables) + sizeof(Slice<Tables, Tensor>) <= kParameterBytes);
  const auto count = static_cast<int64_t>(tensors.size());
  constexpr int64_t kMost = kSliceTensors<Tables, Tensor>;
  for (int64_t first = 0; first < count; first += kMost) {
    const int64_t last = std::min(first + kMost, count);
    Slice<Tables, Tensor> slice{};
    slice.head = {tensors[first].first_chunk, first, last - first};
    std::copy(tensors.begin() + first, tensors.begin() + last, slice.tensors);
    const int64_t chunks = chunks_in(slice.head, tensors[last - 1]);
    const Status status = launch(doing, kernel, chunks, stream, tables, slice);
    if (status.code) return status;
  }
  return {0, ""};
}

}  // namespace lipcore::cuda
