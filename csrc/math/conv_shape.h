// The geometry of a convolution, for host and device.
#pragma once

#include <cstdint>

namespace lipcore {

struct ConvShape {          // of a convolution in three dimensions: depth, height, width; 1 where there are fewer
  int64_t groups;           // at least 1
  int64_t inputs, outputs;  // channels per group
  int64_t size[3], out[3];  // of the image, and of the gradient (at most the full output)
  int64_t kernel[3], stride[3], padding[3], dilation[3];
};

}  // namespace lipcore
