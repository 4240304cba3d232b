// The norm for GPUs.
#include "../common/bind_norm.h"

#include "binding.h"
#include "norm.h"
#include "ops.h"

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

bool reads_any_weight() { return true; }

}  // namespace

std::tuple<Tensor, Tensor> on_cuda::add_rms_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                                 double eps, ScalarType type) {
  return run_norm(x, residual, weight, eps, type);
}

std::tuple<Tensor, Tensor> on_cuda::add_rms_norm_backward(const Tensor& dy, const OptionalTensor& dr, const Tensor& r,
                                                          const Tensor& weight, double eps) {
  return vim::add_rms_norm_backward(dy, dr, r, weight, eps);
}

}  // namespace vim

VIM_DEVICE_IMPL(m) { vim::implement_norm(m, vim::kFamily); }
