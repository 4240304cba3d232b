// The norm for GPUs.
#include "../common/bind_norm.h"
#include "norm.h"
#include "binding.h"

namespace vim {
namespace {

void run_forward(const Norm& norm, const Tensor& like) {
  const OnDeviceOf device(like);
  cuda::norm_forward(norm, device.stream());
}

void run_backward(Norm& norm, const Tensor& like) {
  const OnDeviceOf device(like);
  const Tensor partials = allocate(like, {cuda::norm_partial_floats(norm)}, ScalarType::Float);
  norm.partials = mutable_floats(partials);
  cuda::norm_backward(norm, device.stream());
}

bool reads_weight_like_x() { return true; }

}  // namespace
}  // namespace vim

VIM_DEVICE_IMPL(m) { vim::implement_norm(m, vim::kFamily); }
