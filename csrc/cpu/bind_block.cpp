// vim::bidirectional_blocks_inference: layers of the model, from the residual addition to out_proj, in one call. What it
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

using Operands = std::vector<OptionalTensor>;

// Operands of a block, in the order of `BlockWeights` (vim/ops/bidirectional_block.py).
struct BlockOperands {
  static constexpr int64_t kCount = 19;
  const OptionalTensor* given;

  const OptionalTensor& optional(int64_t i) const { return given[i]; }
  const Tensor& operator[](int64_t i) const {
    STD_TORCH_CHECK(given[i].has_value(), "vim: operand ", i, " of a block is missing");
    return *given[i];
  }
};

std::tuple<Tensor, Tensor> run_block(const Tensor& hidden_states, const OptionalTensor& residual,
                                     const BlockOperands& operands, double eps, double scale) {
  const Tensor &norm_weight = operands[0], &in_proj = operands[1], &out_proj = operands[17];
  const OptionalTensor &in_bias = operands.optional(2), &out_bias = operands.optional(18);
  const Tensor &conv_weight = operands[3], &x_proj = operands[5], &dt_weight = operands[6], &dt_bias = operands[7];
  const Tensor &A_log = operands[8], &D = operands[9];
  const Tensor &conv_weight_b = operands[10], &x_proj_b = operands[12], &dt_weight_b = operands[13];
  const Tensor &dt_bias_b = operands[14], &A_b_log = operands[15], &D_b = operands[16];
  const OptionalTensor &conv_bias = operands.optional(4), &conv_bias_b = operands.optional(11);
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
          : std::tuple(multiply(u, x_proj, std::nullopt, x_dbl_columns),
                       multiply(u_b, x_proj_b, std::nullopt, x_dbl_columns));
  const Tensor y = on_cpu::bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A_log, D, u_b, x_dbl_b, dt_weight_b,
                                              dt_bias_b, A_b_log, D_b, z, scale);
  return {multiply(y, out_proj, out_bias, hidden_states.size(2)), sum};
}

std::tuple<Tensor, Tensor> run_blocks(const Tensor& hidden_states, const OptionalTensor& residual,
                                      const Operands& operands, const std::vector<double>& eps,
                                      const std::vector<double>& scales) {
  const int64_t blocks = static_cast<int64_t>(eps.size());
  STD_TORCH_CHECK(blocks > 0 && scales.size() == eps.size() &&
                      static_cast<int64_t>(operands.size()) == blocks * BlockOperands::kCount,
                  "vim: every block has ", BlockOperands::kCount, " operands, one eps and one scale");
  Tensor x = hidden_states;
  OptionalTensor sum = residual;
  for (int64_t i = 0; i < blocks; ++i) {
    std::tie(x, sum) = run_block(x, sum, {operands.data() + i * BlockOperands::kCount}, eps[i], scales[i]);
  }
  return {x, *sum};
}

}  // namespace
}  // namespace vim

STABLE_TORCH_LIBRARY_FRAGMENT(vim, m) {
  m.def(
      "bidirectional_blocks_inference(Tensor hidden_states, Tensor? residual, Tensor?[] operands, float[] eps, "
      "float[] scales) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { m.impl("bidirectional_blocks_inference", TORCH_BOX(&vim::run_blocks)); }

// For weights in oneDNN's layout.
STABLE_TORCH_LIBRARY_IMPL(vim, MkldnnCPU, m) { m.impl("bidirectional_blocks_inference", TORCH_BOX(&vim::run_blocks)); }
