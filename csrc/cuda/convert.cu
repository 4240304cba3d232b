// Conversion of a layer's weights. Each is small: starting a kernel for every one would take longer than the work.
#include "convert.h"
#include "device.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kNumbers = 4;  // of a thread, kThreads apart

template <class From, class To>
__global__ void __launch_bounds__(kThreads) convert_kernel(const __grid_constant__ Conversions arrays) {
  const From* from = static_cast<const From*>(arrays.from[blockIdx.y]);
  To* to = static_cast<To*>(arrays.to[blockIdx.y]);
  const int64_t size = arrays.size[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kNumbers + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kNumbers; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < size) from_float(to_float(from[i]), to + i);
  }
}

}  // namespace

void convert(const Conversions& arrays, Element from, Element to, Stream stream) {
  int64_t longest = 0;
  for (int i = 0; i < arrays.count; ++i) longest = larger(longest, arrays.size[i]);
  const Geometry geometry{
      dim3(static_cast<unsigned>(blocks_in(longest, kThreads * kNumbers)), static_cast<unsigned>(arrays.count)),
      dim3(kThreads), 0};
  with_element(from, [&](auto* source) {
    with_element(to, [&](auto* target) {
      using From = std::remove_pointer_t<decltype(source)>;
      using To = std::remove_pointer_t<decltype(target)>;
      launch(convert_kernel<From, To>, geometry, stream, arrays);
    });
  });
}

}  // namespace VIM_ISA
}  // namespace vim
