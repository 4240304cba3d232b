// The ops of this device as others here call them, without a dispatcher between.
#pragma once

#include <tuple>

#include "../common/binding.h"

namespace vim::on_cpu {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                        double eps);

std::tuple<Tensor, Tensor> bidirectional_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                const Tensor& weight_b, const OptionalTensor& bias_b);

// Saves no states.
Tensor bidirectional_scan(const Tensor& u, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
                          const Tensor& A_log, const Tensor& D, const Tensor& u_b, const Tensor& x_dbl_b,
                          const Tensor& dt_weight_b, const Tensor& dt_bias_b, const Tensor& A_b_log, const Tensor& D_b,
                          const Tensor& z, double scale);

}  // namespace vim::on_cpu
