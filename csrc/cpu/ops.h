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

// x weight^T + bias for x (..., depth) and a weight (columns, depth) that vim::pack_weight has packed.
Tensor packed_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t columns);

// Two of them at once, without biases: threads share them out.
std::tuple<Tensor, Tensor> packed_linear_pair(const Tensor& x, const Tensor& packed, const Tensor& x_b,
                                              const Tensor& packed_b, int64_t columns);

}  // namespace vim::on_cpu
