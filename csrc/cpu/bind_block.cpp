// vim::bidirectional_block_inference: a layer of the model, from the residual addition to out_proj, in one call. What it
// saves is the Python between the ops, which is a fifth of a small model's time at batch 1.
#include <string>

#include "ops.h"

namespace vim {
namespace {

// Weights that vim::pack_weight has packed have three dimensions, those in oneDNN's layout two.
bool is_packed(const Tensor& weight) { return weight.dim() == 3; }

// x weight^T + bias, (..., columns)
Tensor multiply(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t columns) {
  if (is_packed(weight)) return on_cpu::packed_linear(x, weight, bias, columns);
  const std::string no_attribute = "none";
  const std::vector<int64_t> no_scalars;
  const std::optional<std::string> no_algorithm = "";
  return std::get<0>(
      call_op<Tensor>("mkldnn::_linear_pointwise", x, weight, bias, no_attribute, no_scalars, no_algorithm));
}

std::tuple<Tensor, Tensor> block(
    const Tensor& hidden_states, const OptionalTensor& residual, const Tensor& norm_weight, const Tensor& in_proj,
    const OptionalTensor& in_bias, const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& x_proj,
    const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log, const Tensor& D, const Tensor& conv_weight_b,
    const OptionalTensor& conv_bias_b, const Tensor& x_proj_b, const Tensor& dt_weight_b, const Tensor& dt_bias_b,
    const Tensor& A_b_log, const Tensor& D_b, const Tensor& out_proj, const OptionalTensor& out_bias, double eps,
    double scale) {
  if (in_bias.has_value()) check_memory("in_bias", *in_bias);
  if (out_bias.has_value()) check_memory("out_bias", *out_bias);
  auto [normed, sum] = on_cpu::add_rms_norm(hidden_states, residual, norm_weight, eps);
  const int64_t d_inner = conv_weight.size(0), x_dbl_columns = dt_weight.size(1) + 2 * A_log.size(1);
  Tensor xz = multiply(normed, in_proj, in_bias, 2 * d_inner);
  const Tensor x = torch::stable::narrow(xz, 2, 0, d_inner), z = torch::stable::narrow(xz, 2, d_inner, d_inner);
  const auto [u, u_b] = on_cpu::bidirectional_conv1d(x, conv_weight, conv_bias, conv_weight_b, conv_bias_b);
  const auto [x_dbl, x_dbl_b] =
      is_packed(x_proj) && is_packed(x_proj_b)
          ? on_cpu::packed_linear_pair(u, x_proj, u_b, x_proj_b, x_dbl_columns)
          : std::tuple(multiply(u, x_proj, std::nullopt, x_dbl_columns), multiply(u_b, x_proj_b, std::nullopt, x_dbl_columns));
  const Tensor y = on_cpu::bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A_log, D, u_b, x_dbl_b, dt_weight_b,
                                              dt_bias_b, A_b_log, D_b, z, scale);
  return {multiply(y, out_proj, out_bias, hidden_states.size(2)), sum};
}

}  // namespace
}  // namespace vim

STABLE_TORCH_LIBRARY_FRAGMENT(vim, m) {
  m.def(
      "bidirectional_block_inference(Tensor hidden_states, Tensor? residual, Tensor norm_weight, Tensor in_proj, "
      "Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor D, Tensor conv_weight_b, Tensor? conv_bias_b, Tensor x_proj_b, Tensor dt_weight_b, "
      "Tensor dt_bias_b, Tensor A_b_log, Tensor D_b, Tensor out_proj, Tensor? out_bias, float eps, float scale) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { m.impl("bidirectional_block_inference", TORCH_BOX(&vim::block)); }

// For weights in oneDNN's layout.
STABLE_TORCH_LIBRARY_IMPL(vim, MkldnnCPU, m) { m.impl("bidirectional_block_inference", TORCH_BOX(&vim::block)); }
