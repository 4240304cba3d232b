// The ops of this device as the block calls them, without a dispatcher between.
#pragma once

#include "../common/binding.h"

namespace vim::on_cuda {

// y is of `type`.
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                        double eps, ScalarType type);
std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const OptionalTensor& dr, const Tensor& r,
                                                 const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> bidirectional_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                const Tensor& weight_b, const OptionalTensor& bias_b);

// Writes the gradient of x to `dx` and returns the weights'.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_gradients(const Tensor& dout, const Tensor& dout_b, const Tensor& x,
                                                          const Tensor& weight, const OptionalTensor& bias,
                                                          const Tensor& weight_b, const OptionalTensor& bias_b,
                                                          const Tensor& dx);

// One direction's operands of a scan.
struct ScanSide {
  Tensor u, x_dbl, dt_weight, dt_bias, A_log, D;
};

std::tuple<Tensor, Tensor> bidirectional_scan(const ScanSide& forward, const ScanSide& backward, const Tensor& z,
                                              double scale, int64_t checkpoint_every);

// Writes the gradients of z and of both directions' x_dbl to `dz` and `dx_dbl`, replaces dy by the forward pass's
// result, and returns the gradients of the operands.
std::vector<Tensor> scan_gradients(const Tensor& dy, const ScanSide& forward, const ScanSide& backward, const Tensor& z,
                                   const Tensor& checkpoints, double scale, int64_t checkpoint_every, const Tensor& dz,
                                   const std::array<OptionalTensor, 2>& dx_dbl);

}  // namespace vim::on_cuda
