// vim::bidirectional_block, forward and backward, for any device: checks, results, and the order of their memory.
// Float64 goes to the reference, which is registered under a name of its own. Included once per library.
#pragma once

#include <string>

#include "binding.h"

namespace vim {
namespace {

constexpr size_t kBlockWeights = 19;

// Weights of one direction, named as in the schema in vim/ops/bidirectional_block/register.py.
struct BlockDirection {
  Tensor conv_weight;
  OptionalTensor conv_bias;
  Tensor x_proj, dt_weight, dt_bias, A_log, D;
};

// The weights of a layer, or their gradients.
struct BlockWeights {
  Tensor norm_weight, in_proj;
  OptionalTensor in_bias;
  BlockDirection sides[2];
  Tensor out_proj;
  OptionalTensor out_bias;

  int64_t d_model() const { return out_proj.size(0); }
  int64_t d_inner() const { return out_proj.size(1); }
  int64_t d_state() const { return sides[0].A_log.size(1); }
  int64_t dt_rank() const { return sides[0].dt_weight.size(1); }
  int64_t width() const { return sides[0].conv_weight.size(2); }
  int64_t x_dbl_columns() const { return dt_rank() + 2 * d_state(); }

  // In the order of the schema; null where a weight is absent.
  std::array<const Tensor*, kBlockWeights> list() const {
    const auto given = [](const OptionalTensor& x) { return x.has_value() ? &*x : nullptr; };
    const BlockDirection &f = sides[0], &b = sides[1];
    return {&norm_weight, &in_proj, given(in_bias), &f.conv_weight, given(f.conv_bias), &f.x_proj, &f.dt_weight,
            &f.dt_bias,   &f.A_log, &f.D,           &b.conv_weight, given(b.conv_bias), &b.x_proj, &b.dt_weight,
            &b.dt_bias,   &b.A_log, &b.D,           &out_proj,      given(out_bias)};
  }

  bool supported() const {
    const auto tensors = list();
    return std::all_of(tensors.begin(), tensors.end(),
                       [](const Tensor* x) { return !x || element_of(*x).has_value(); });
  }

  void check(const Tensor& like) const {
    STD_TORCH_CHECK(out_proj.dim() == 2, "vim: out_proj must be (d_model, d_inner)");
    STD_TORCH_CHECK(sides[0].A_log.dim() == 2, "vim: A_log must be (d_inner, d_state)");
    STD_TORCH_CHECK(sides[0].dt_weight.dim() == 2, "vim: dt_weight must be (d_inner, dt_rank)");
    STD_TORCH_CHECK(sides[0].conv_weight.dim() == 3, "vim: conv_weight must be (d_inner, 1, d_conv)");
    const int64_t model = d_model(), inner = d_inner();
    const auto tensors = list();
    auto next = tensors.begin();
    const auto check_next = [&](const char* name, const Sizes& sizes, const char* side = "") {
      const Tensor* weight = *next++;
      if (weight == nullptr) return;
      check_device(name, *weight, like);
      check_sizes(name, *weight, sizes, side);
      STD_TORCH_CHECK(weight->numel() > 0, "vim: ", name, side, " must not be empty");
    };
    check_next("norm_weight", {model});
    check_next("in_proj", {2 * inner, model});
    check_next("in_bias", {2 * inner});
    for (const char* side : {"", kBackwardSide}) {
      check_next("conv_weight", {inner, 1, width()}, side);
      check_next("conv_bias", {inner}, side);
      check_next("x_proj", {x_dbl_columns(), inner}, side);
      check_next("dt_weight", {inner, dt_rank()}, side);
      check_next("dt_bias", {inner}, side);
      check_next("A_log", {inner, d_state()}, side);
      check_next("D", {inner}, side);
    }
    check_next("out_proj", {model, inner});
    check_next("out_bias", {model});
  }
};

// Sizes of a call.
struct BlockShape {
  int64_t batch, length, d_model, d_inner, d_state, dt_rank, checkpoint_every;

  BlockShape(const Tensor& x, const BlockWeights& weights, int64_t every)
      : batch(x.size(0)),
        length(x.size(1)),
        d_model(weights.d_model()),
        d_inner(weights.d_inner()),
        d_state(weights.d_state()),
        dt_rank(weights.dt_rank()),
        checkpoint_every(std::min(every, std::max<int64_t>(1, length))) {
    STD_TORCH_CHECK(every >= 0, "vim: checkpoint_every must not be negative, got ", every);
  }

  int64_t tokens() const { return batch * length; }
  int64_t x_dbl_columns() const { return dt_rank + 2 * d_state; }
  int64_t chunks() const { return checkpoint_every == 0 ? 0 : (length + checkpoint_every - 1) / checkpoint_every; }
  Sizes rows(int64_t columns) const { return {batch, length, columns}; }
  Sizes checkpoints() const { return {2, batch, chunks(), d_state, d_inner}; }
};

// What the forward pass makes. The last three are for a backward pass; without one they are empty.
struct BlockResults {
  Tensor out, residual, xz, x_dbl, checkpoints;
};

// What each device supplies, for arguments that are known to fit. `type` is the dtype of products and activations.
BlockResults run_forward(const BlockShape& shape, const BlockWeights& weights, const Tensor& hidden_states,
                         const OptionalTensor& residual, ScalarType type, double eps, double scale);

// Gradients in the order of the schema: of the residual sum, then of the weights. `weight_grads` says whether those of
// the products' weights are wanted; where they are not, they are empty.
std::vector<Tensor> run_backward(const BlockShape& shape, const BlockWeights& weights, const Tensor& dout,
                                 const OptionalTensor& dresidual, const Tensor& residual, const Tensor& xz,
                                 const Tensor& x_dbl, const Tensor& checkpoints, double eps, double scale,
                                 bool weight_grads);

bool is_block_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

using BlockTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

BlockTuple bidirectional_block(const Tensor& hidden_states, const OptionalTensor& residual, const Tensor& norm_weight,
                               const Tensor& in_proj, const OptionalTensor& in_bias, const Tensor& conv_weight,
                               const OptionalTensor& conv_bias, const Tensor& x_proj, const Tensor& dt_weight,
                               const Tensor& dt_bias, const Tensor& A_log, const Tensor& D, const Tensor& conv_weight_b,
                               const OptionalTensor& conv_bias_b, const Tensor& x_proj_b, const Tensor& dt_weight_b,
                               const Tensor& dt_bias_b, const Tensor& A_b_log, const Tensor& D_b,
                               const Tensor& out_proj, const OptionalTensor& out_bias, ScalarType dtype, double eps,
                               double scale, int64_t checkpoint_every) {
  const BlockWeights weights{norm_weight,
                             in_proj,
                             in_bias,
                             {{conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D},
                              {conv_weight_b, conv_bias_b, x_proj_b, dt_weight_b, dt_bias_b, A_b_log, D_b}},
                             out_proj,
                             out_bias};
  if (!element_of(hidden_states).has_value() || !is_float(residual) || !is_block_type(dtype) || !weights.supported()) {
    return call_op<Tensor, Tensor, Tensor, Tensor, Tensor>(
        "vim::bidirectional_block_reference", hidden_states, residual, norm_weight, in_proj, in_bias, conv_weight,
        conv_bias, x_proj, dt_weight, dt_bias, A_log, D, conv_weight_b, conv_bias_b, x_proj_b, dt_weight_b, dt_bias_b,
        A_b_log, D_b, out_proj, out_bias, dtype, eps, scale, checkpoint_every);
  }
  weights.check(hidden_states);
  STD_TORCH_CHECK(hidden_states.dim() == 3 && hidden_states.size(2) == weights.d_model(),
                  "vim: hidden_states must be (batch, len, d_model)");
  check_memory("hidden_states", hidden_states);
  check_device("residual", residual, hidden_states);
  check_sizes("residual", residual, sizes_of(hidden_states));
  const BlockShape shape(hidden_states, weights, checkpoint_every);
  const BlockResults results = run_forward(shape, weights, hidden_states, residual, dtype, eps, scale);
  return {results.out, results.residual, results.xz, results.x_dbl, results.checkpoints};
}

template <size_t... kIndex>
auto as_tuple(const std::vector<Tensor>& tensors, std::index_sequence<kIndex...>) {
  return std::tuple(tensors[kIndex]...);
}

constexpr size_t kBlockGrads = 1 + kBlockWeights;  // the first is the residual sum's

template <size_t>
using TensorAt = Tensor;

template <size_t... kIndex, class... Arguments>
auto call_backward_reference(std::index_sequence<kIndex...>, const Arguments&... arguments) {
  return call_op<TensorAt<kIndex>...>("vim::bidirectional_block_backward_reference", arguments...);
}

auto bidirectional_block_backward(const Tensor& dout, const OptionalTensor& dresidual, const Tensor& residual,
                                  const Tensor& norm_weight, const Tensor& in_proj, const OptionalTensor& in_bias,
                                  const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& x_proj,
                                  const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log, const Tensor& D,
                                  const Tensor& conv_weight_b, const OptionalTensor& conv_bias_b,
                                  const Tensor& x_proj_b, const Tensor& dt_weight_b, const Tensor& dt_bias_b,
                                  const Tensor& A_b_log, const Tensor& D_b, const Tensor& out_proj,
                                  const OptionalTensor& out_bias, const Tensor& xz, const Tensor& x_dbl,
                                  const Tensor& checkpoints, double eps, double scale, int64_t checkpoint_every,
                                  bool weight_grads)
    -> decltype(as_tuple({}, std::make_index_sequence<kBlockGrads>{})) {
  const BlockWeights weights{norm_weight,
                             in_proj,
                             in_bias,
                             {{conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D},
                              {conv_weight_b, conv_bias_b, x_proj_b, dt_weight_b, dt_bias_b, A_b_log, D_b}},
                             out_proj,
                             out_bias};
  if (!weights.supported() || !is_float(residual) || !is_float(dresidual) || !element_of(xz).has_value() ||
      !same_type(dout, xz) || !same_type(x_dbl, xz) || !is_float(checkpoints)) {
    return call_backward_reference(std::make_index_sequence<kBlockGrads>{}, dout, dresidual, residual, norm_weight,
                                   in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D,
                                   conv_weight_b, conv_bias_b, x_proj_b, dt_weight_b, dt_bias_b, A_b_log, D_b, out_proj,
                                   out_bias, xz, x_dbl, checkpoints, eps, scale, checkpoint_every, weight_grads);
  }
  weights.check(residual);
  STD_TORCH_CHECK(residual.dim() == 3 && residual.size(2) == weights.d_model(),
                  "vim: residual must be (batch, len, d_model)");
  STD_TORCH_CHECK(checkpoint_every > 0, "vim: checkpoint_every must be positive, got ", checkpoint_every);
  const BlockShape shape(residual, weights, checkpoint_every);
  const auto check = [&](const char* name, const Tensor& x, const Sizes& sizes) {
    check_device(name, x, residual);
    check_sizes(name, x, sizes);
  };
  check("residual", residual, shape.rows(shape.d_model));
  check("dout", dout, shape.rows(shape.d_model));
  if (dresidual.has_value()) check("dresidual", *dresidual, shape.rows(shape.d_model));
  check("xz", xz, shape.rows(2 * shape.d_inner));
  check("x_dbl", x_dbl, {2, shape.batch, shape.length, shape.x_dbl_columns()});
  check("checkpoints", checkpoints, shape.checkpoints());
  return as_tuple(run_backward(shape, weights, dense(dout), dense(dresidual), dense(residual), dense(xz), x_dbl,
                               dense(checkpoints), eps, scale, weight_grads),
                  std::make_index_sequence<kBlockGrads>{});
}

// Attaches the op of one family of names, those that end in `suffix`.
template <class Library>
void implement_block(Library& m, const std::string& suffix) {
  m.impl(("bidirectional_block" + suffix).c_str(), TORCH_BOX(&bidirectional_block));
  m.impl(("bidirectional_block_backward" + suffix).c_str(), TORCH_BOX(&bidirectional_block_backward));
}

}  // namespace
}  // namespace vim
