// The convolutions for GPUs.
#include "../common/bind_conv.h"
#include "conv.h"
#include "binding.h"

namespace vim {
namespace {

void run_forward(const Conv& conv, const Tensor& like) {
  const OnDeviceOf device(like);
  cuda::conv_forward(conv, device.stream());
}

void run_backward(Conv& conv, const Tensor& like) {
  const OnDeviceOf device(like);
  const Tensor partials = allocate(like, {cuda::conv_partial_floats(conv)}, ScalarType::Float);
  conv.partials = mutable_floats(partials);
  cuda::conv_backward(conv, device.stream());
}

}  // namespace
}  // namespace vim

VIM_DEVICE_IMPL(m) { vim::implement_convolutions(m, vim::kFamily); }
