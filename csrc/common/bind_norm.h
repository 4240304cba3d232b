// vim::add_rms_norm, forward and backward, for any device: checks, outputs, and the struct that kernels read. Float64
// and mixed dtypes go to the reference, which is registered under a name of its own. Included once per library.
#pragma once

#include <string>

#include "binding.h"

namespace vim {
namespace {

Norm norm_of(const Tensor& x, const Tensor& weight, double eps) {
  Norm norm;
  norm.dim = x.size(x.dim() - 1);
  norm.rows = x.numel() / norm.dim;
  norm.eps = static_cast<float>(eps);
  norm.weight = weight_of(weight);
  return norm;
}

// What each device supplies: both run a norm whose arguments are known to fit. `like` is where workspace is allocated.
void run_forward(const Norm& norm, const Tensor& like);
void run_backward(Norm& norm, const Tensor& like);
// Whether its kernels read weights, and write their gradients, of any element type.
bool reads_any_weight();

bool supports_weight(const Tensor& weight) {
  return is_float(weight) || (reads_any_weight() && element_of(weight).has_value());
}

bool has_channels(const Tensor& x) { return x.dim() > 0 && x.size(x.dim() - 1) > 0; }

// Runs on what fits the device's kernels; y is of `type`.
std::tuple<Tensor, Tensor> run_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, double eps,
                                    ScalarType type) {
  check_device("residual", residual, x);
  check_device("weight", weight, x);
  check_memory("x", x);
  check_sizes("residual", residual, sizes_of(x));
  check_sizes("weight", weight, {x.size(x.dim() - 1)});
  const Tensor rows = as_rows(x), scale = dense(weight);
  const OptionalTensor added = dense(residual);
  const Tensor y = allocate(x, sizes_of(x), type), r = allocate(x, sizes_of(x), ScalarType::Float);
  Norm norm = norm_of(x, scale, eps);
  norm.element = *element_of(x);
  norm.y_element = *element_of(y);
  norm.x = rows.const_data_ptr();
  norm.x_row = row_stride(rows);
  norm.residual = floats(added);
  norm.y = y.mutable_data_ptr();
  norm.r = mutable_floats(r);
  run_forward(norm, x);
  return {y, r};
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                        double eps) {
  if (!element_of(x).has_value() || !is_float(residual) || !supports_weight(weight) || !has_channels(x)) {
    return call_op<Tensor, Tensor>("vim::add_rms_norm_reference", x, residual, weight, eps);
  }
  return run_norm(x, residual, weight, eps, x.scalar_type());
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const OptionalTensor& dy, const OptionalTensor& dr, const Tensor& r,
                                                 const Tensor& weight, double eps) {
  if (!is_float(r) || !supports_weight(weight) || !is_float(dr) || (dy.has_value() && !element_of(*dy).has_value()) ||
      !has_channels(r)) {
    return call_op<Tensor, Tensor>("vim::add_rms_norm_backward_reference", dy, dr, r, weight, eps);
  }
  check_device("dy", dy, r);
  check_device("dr", dr, r);
  check_device("weight", weight, r);
  check_memory("r", r);
  check_sizes("dy", dy, sizes_of(r));
  check_sizes("dr", dr, sizes_of(r));
  check_sizes("weight", weight, {r.size(r.dim() - 1)});
  const Tensor rows = dense(r), scale = dense(weight);
  const OptionalTensor gradient = dense(dy), arriving = dense(dr);
  const Tensor total = allocate_like(r), dweight = allocate_like(weight);
  Norm norm = norm_of(r, scale, eps);
  if (gradient.has_value()) {
    norm.element = *element_of(*gradient);
    norm.dy = gradient->const_data_ptr();
  }
  norm.dr = floats(arriving);
  norm.r = const_cast<float*>(floats(rows));
  norm.total = mutable_floats(total);
  norm.dweight = gradient_of(dweight);
  run_backward(norm, r);
  return {total, dweight};
}

// Attaches the ops of one family of names, those that end in `suffix`.
template <class Library>
void implement_norm(Library& m, const std::string& suffix) {
  m.impl(("add_rms_norm" + suffix).c_str(), TORCH_BOX(&add_rms_norm));
  m.impl(("add_rms_norm_backward" + suffix).c_str(), TORCH_BOX(&add_rms_norm_backward));
}

}  // namespace
}  // namespace vim
