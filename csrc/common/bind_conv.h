// vim::causal_conv1d, vim::segmented_conv1d and vim::bidirectional_conv1d, forward and backward, for any device:
// checks, outputs, and the struct that kernels read. Float64 and mixed dtypes go to the reference, which is registered
// under a name of its own. Included once per library.
#pragma once

#include <string>

#include "binding.h"

namespace vim {
namespace {

// A weight is (dim, width), or (dim, 1, width) as modules have it.
struct Filter {
  Tensor weight;
  OptionalTensor bias;
  const char* side = "";

  bool supported() const { return is_float(weight) && is_float(bias) && width() > 0; }

  int64_t width() const { return weight.dim() > 0 ? weight.size(weight.dim() - 1) : 0; }

  void check(const Tensor& x, int64_t dim) const {
    check_extent({x.size(0), x.size(1), x.size(2), width()});
    check_device("weight", weight, x);
    check_device("bias", bias, x);
    check_sizes("weight", weight, weight.dim() == 3 ? Sizes{dim, 1, width()} : Sizes{dim, width()}, side);
    check_sizes("bias", bias, {dim}, side);
  }

  void make_dense() {
    weight = dense(weight);
    bias = dense(bias);
  }

  ConvDirection direction(bool reverse) const {
    ConvDirection side;
    side.weight = weight_of(weight);
    side.bias = weight_of(bias);
    side.width = width();
    side.reverse = reverse;
    return side;
  }
};

// What each device supplies: both run a convolution whose arguments are known to fit. `like` is where workspace is
// allocated.
void run_forward(const Conv& conv, const Tensor& like);
void run_backward(Conv& conv, const Tensor& like);

// ---- causal_conv1d and segmented_conv1d: (batch, dim, len) -----------------------------------------------------

// What both passes of both ops check first.
struct CausalInputs {
  Tensor x;
  Filter filter;
  OptionalTensor seq_idx = std::nullopt;

  bool supported() const {
    return element_of(x).has_value() && filter.supported() &&
           (!seq_idx.has_value() || seq_idx->scalar_type() == ScalarType::Int);
  }

  void check() const {
    STD_TORCH_CHECK(x.dim() == 3, "vim: x must be (batch, dim, len)");
    check_memory("x", x);
    filter.check(x, x.size(1));
    check_device("seq_idx", seq_idx, x);
    check_sizes("seq_idx", seq_idx, {x.size(0), x.size(2)});
  }

  void make_dense() {
    filter.make_dense();
    seq_idx = dense(seq_idx);
  }

  Conv conv(bool silu, bool reverse) const {
    Conv conv;
    conv.element = *element_of(x);
    conv.batch = x.size(0);
    conv.dim = x.size(1);
    conv.length = x.size(2);
    conv.silu = silu;
    conv.x = input(x, 0, 2, 1);
    conv.direction[0] = filter.direction(reverse);
    if (seq_idx.has_value()) conv.seq_idx = static_cast<const int32_t*>(seq_idx->const_data_ptr());
    return conv;
  }
};

Tensor run_causal(CausalInputs inputs, bool silu, bool reverse) {
  inputs.check();
  inputs.make_dense();
  Conv conv = inputs.conv(silu, reverse);
  const Tensor out = allocate_like_layout(inputs.x);
  conv.direction[0].out = output(out, 0, 2, 1);
  run_forward(conv, inputs.x);
  return out;
}

Tensor causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu, bool reverse) {
  const CausalInputs inputs{x, {weight, bias}};
  if (!inputs.supported()) {
    return std::get<0>(call_op<Tensor>("vim::causal_conv1d_reference", x, weight, bias, silu, reverse));
  }
  return run_causal(inputs, silu, reverse);
}

Tensor segmented_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& seq_idx,
                        bool silu, bool reverse) {
  const CausalInputs inputs{x, {weight, bias}, seq_idx};
  if (!inputs.supported()) {
    return std::get<0>(call_op<Tensor>("vim::segmented_conv1d_reference", x, weight, bias, seq_idx, silu, reverse));
  }
  return run_causal(inputs, silu, reverse);
}

std::tuple<Tensor, Tensor, Tensor> causal_gradients(const Tensor& dout, CausalInputs inputs, bool silu, bool reverse) {
  inputs.check();
  inputs.make_dense();
  const Tensor& x = inputs.x;
  const OptionalTensor& bias = inputs.filter.bias;
  check_device("dout", dout, x);
  check_sizes("dout", dout, sizes_of(x));
  Conv conv = inputs.conv(silu, reverse);
  const Tensor dx = allocate_like_layout(x), dweight = allocate_like(inputs.filter.weight);
  const Tensor dbias = bias.has_value() ? allocate_like(*bias) : absent(x, ScalarType::Float);
  ConvDirection& side = conv.direction[0];
  conv.dx = output(dx, 0, 2, 1);
  side.dout = input(dout, 0, 2, 1);
  side.dweight = gradient_of(dweight);
  if (bias.has_value()) side.dbias = gradient_of(dbias);
  run_backward(conv, x);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                          const OptionalTensor& bias, bool silu, bool reverse) {
  const CausalInputs inputs{x, {weight, bias}};
  if (!inputs.supported() || !same_type(dout, x)) {
    return call_op<Tensor, Tensor, Tensor>("vim::causal_conv1d_backward_reference", dout, x, weight, bias, silu,
                                           reverse);
  }
  return causal_gradients(dout, inputs, silu, reverse);
}

std::tuple<Tensor, Tensor, Tensor> segmented_conv1d_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                             const OptionalTensor& bias, const Tensor& seq_idx,
                                                             bool silu, bool reverse) {
  const CausalInputs inputs{x, {weight, bias}, seq_idx};
  if (!inputs.supported() || !same_type(dout, x)) {
    return call_op<Tensor, Tensor, Tensor>("vim::segmented_conv1d_backward_reference", dout, x, weight, bias, seq_idx,
                                           silu, reverse);
  }
  return causal_gradients(dout, inputs, silu, reverse);
}

// ---- bidirectional_conv1d: (batch, len, dim) --------------------------------------------------------------------

Conv bidirectional(const Tensor& x, const Filter (&filters)[2]) {
  Conv conv;
  conv.element = *element_of(x);
  conv.batch = x.size(0);
  conv.length = x.size(1);
  conv.dim = x.size(2);
  conv.silu = true;
  conv.directions = 2;
  conv.x = input(x, 0, 1, 2);
  for (int d = 0; d < 2; ++d) conv.direction[d] = filters[d].direction(d == 1);
  return conv;
}

// Runs on what fits the device's kernels.
std::tuple<Tensor, Tensor> run_bidirectional(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const Tensor& weight_b, const OptionalTensor& bias_b) {
  Filter filters[2] = {{weight, bias}, {weight_b, bias_b, kBackwardSide}};
  STD_TORCH_CHECK(x.dim() == 3, "vim: x must be (batch, len, dim)");
  check_memory("x", x);
  for (Filter& filter : filters) {
    filter.check(x, x.size(2));
    filter.make_dense();
  }
  Conv conv = bidirectional(x, filters);
  const Tensor out = allocate_like(x), out_b = allocate_like(x);
  conv.direction[0].out = output(out, 0, 1, 2);
  conv.direction[1].out = output(out_b, 0, 1, 2);
  run_forward(conv, x);
  return {out, out_b};
}

std::tuple<Tensor, Tensor> bidirectional_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                const Tensor& weight_b, const OptionalTensor& bias_b) {
  const Filter filters[2] = {{weight, bias}, {weight_b, bias_b}};
  if (!element_of(x).has_value() || !filters[0].supported() || !filters[1].supported()) {
    return call_op<Tensor, Tensor>("vim::bidirectional_conv1d_reference", x, weight, bias, weight_b, bias_b);
  }
  return run_bidirectional(x, weight, bias, weight_b, bias_b);
}

// Writes the gradient of x to `dx`, and returns the weights'.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_gradients(const Tensor& dout, const Tensor& dout_b, const Tensor& x,
                                                          const Tensor& weight, const OptionalTensor& bias,
                                                          const Tensor& weight_b, const OptionalTensor& bias_b,
                                                          const Tensor& dx) {
  Filter filters[2] = {{weight, bias}, {weight_b, bias_b, kBackwardSide}};
  for (Filter& filter : filters) {
    filter.check(x, x.size(2));
    filter.make_dense();
  }
  Conv conv = bidirectional(x, filters);
  const Tensor dweight = allocate_like(weight), dweight_b = allocate_like(weight_b);
  const Tensor dbias = bias.has_value() ? allocate_like(*bias) : absent(x, ScalarType::Float);
  const Tensor dbias_b = bias_b.has_value() ? allocate_like(*bias_b) : absent(x, ScalarType::Float);
  conv.dx = output(dx, 0, 1, 2);
  conv.direction[0].dout = input(dout, 0, 1, 2);
  conv.direction[1].dout = input(dout_b, 0, 1, 2);
  conv.direction[0].dweight = gradient_of(dweight);
  conv.direction[1].dweight = gradient_of(dweight_b);
  if (bias.has_value()) conv.direction[0].dbias = gradient_of(dbias);
  if (bias_b.has_value()) conv.direction[1].dbias = gradient_of(dbias_b);
  run_backward(conv, x);
  return {dweight, dbias, dweight_b, dbias_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_conv1d_backward(
    const Tensor& dout, const Tensor& dout_b, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& weight_b, const OptionalTensor& bias_b) {
  const Filter filters[2] = {{weight, bias}, {weight_b, bias_b, kBackwardSide}};
  if (!element_of(x).has_value() || !filters[0].supported() || !filters[1].supported() || !same_type(dout, x) ||
      !same_type(dout_b, x)) {
    return call_op<Tensor, Tensor, Tensor, Tensor, Tensor>("vim::bidirectional_conv1d_backward_reference", dout, dout_b,
                                                           x, weight, bias, weight_b, bias_b);
  }
  STD_TORCH_CHECK(x.dim() == 3, "vim: x must be (batch, len, dim)");
  check_memory("x", x);
  check_device("dout", dout, x);
  check_sizes("dout", dout, sizes_of(x));
  check_device("dout_b", dout_b, x);
  check_sizes("dout_b", dout_b, sizes_of(x));
  const Tensor dx = allocate_like(x);
  return std::tuple_cat(std::tuple(dx), conv_gradients(dout, dout_b, x, weight, bias, weight_b, bias_b, dx));
}

// Attaches the ops of one family of names, those that end in `suffix`.
template <class Library>
void implement_convolutions(Library& m, const std::string& suffix) {
  m.impl(("causal_conv1d" + suffix).c_str(), TORCH_BOX(&causal_conv1d));
  m.impl(("causal_conv1d_backward" + suffix).c_str(), TORCH_BOX(&causal_conv1d_backward));
  m.impl(("segmented_conv1d" + suffix).c_str(), TORCH_BOX(&segmented_conv1d));
  m.impl(("segmented_conv1d_backward" + suffix).c_str(), TORCH_BOX(&segmented_conv1d_backward));
  m.impl(("bidirectional_conv1d" + suffix).c_str(), TORCH_BOX(&bidirectional_conv1d));
  m.impl(("bidirectional_conv1d_backward" + suffix).c_str(), TORCH_BOX(&bidirectional_conv1d_backward));
}

}  // namespace
}  // namespace vim
