// The convolutions for GPUs.
#include "../common/bind_conv.h"

#include "binding.h"
#include "conv.h"
#include "ops.h"

namespace vim {
namespace {

void run_forward(const Conv& conv, const Tensor& like) {
  const OnDeviceOf device(like);
  conv.seq_idx == nullptr ? cuda::conv_forward(conv, device.stream())
                          : cuda::segmented_conv_forward(conv, device.stream());
}

void run_backward(Conv& conv, const Tensor& like) {
  const OnDeviceOf device(like);
  if (conv.seq_idx != nullptr) return cuda::segmented_conv_backward(conv, device.stream());
  const Tensor partials = allocate(like, {cuda::conv_partial_floats(conv)}, ScalarType::Float);
  conv.partials = mutable_floats(partials);
  cuda::conv_backward(conv, device.stream());
}

}  // namespace

std::tuple<Tensor, Tensor> on_cuda::bidirectional_conv1d(const Tensor& x, const Tensor& weight,
                                                         const OptionalTensor& bias, const Tensor& weight_b,
                                                         const OptionalTensor& bias_b) {
  return run_bidirectional(x, weight, bias, weight_b, bias_b);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> on_cuda::conv_gradients(const Tensor& dout, const Tensor& dout_b,
                                                                   const Tensor& x, const Tensor& weight,
                                                                   const OptionalTensor& bias, const Tensor& weight_b,
                                                                   const OptionalTensor& bias_b, const Tensor& dx) {
  return vim::conv_gradients(dout, dout_b, x, weight, bias, weight_b, bias_b, dx);
}

}  // namespace vim

VIM_DEVICE_IMPL(m) { vim::implement_convolutions(m, vim::kFamily); }
