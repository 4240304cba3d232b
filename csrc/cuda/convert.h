// Conversion of several small arrays between element types by one kernel.
#pragma once

#include "../common/arguments.h"

namespace vim {
namespace cuda {

constexpr int kMostConversions = 20;

// Contiguous arrays
struct Conversions {
  const void* from[kMostConversions] = {};
  void* to[kMostConversions] = {};
  int64_t size[kMostConversions] = {};
  int count = 0;
};

void convert(const Conversions& arrays, Element from, Element to, void* stream);

}  // namespace cuda
}  // namespace vim
