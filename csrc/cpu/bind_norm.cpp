// vim::add_rms_norm, forward and backward, for key CPU. Float64 and mixed dtypes go to the reference.
#include "../common/binding.h"
#include "parallel.h"

namespace vim {
namespace {

// Rows of x, (..., dim): x itself where its rows lie at one distance from each other, else a copy.
Tensor as_rows(const Tensor& x) {
  if (x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1)) return x;
  bool regular = x.stride(x.dim() - 1) == 1;
  for (int64_t axis = 0; axis + 2 < x.dim(); ++axis) {
    regular = regular && x.stride(axis) == x.stride(axis + 1) * x.size(axis + 1);
  }
  return regular ? x : torch::stable::contiguous(x);
}

Norm norm_of(const Tensor& x, const Tensor& weight, double eps) {
  Norm norm;
  norm.dim = x.size(x.dim() - 1);
  norm.rows = x.numel() / norm.dim;
  norm.eps = static_cast<float>(eps);
  norm.weight = floats(weight);
  return norm;
}

// A channel of a row costs about a tenth of a scan's channel-step.
int64_t work_of(const Norm& norm) { return norm.rows * norm.dim / 10; }

bool has_channels(const Tensor& x) { return x.dim() > 0 && x.size(x.dim() - 1) > 0; }

std::tuple<Tensor, Tensor> add_rms_norm_cpu(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                            double eps) {
  if (!element_of(x).has_value() || !is_float(residual) || !is_float(weight) || !has_channels(x)) {
    return call_op<Tensor, Tensor>("vim::add_rms_norm_reference", x, residual, weight, eps);
  }
  check_sizes("residual", residual, sizes_of(x));
  check_sizes("weight", weight, {x.size(x.dim() - 1)});
  const Tensor rows = as_rows(x), scale = dense(weight);
  const OptionalTensor added = dense(residual);
  const Tensor y = allocate_like(x), r = allocate(x, sizes_of(x), ScalarType::Float);
  Norm norm = norm_of(x, scale, eps);
  norm.element = *element_of(x);
  norm.x = rows.const_data_ptr();
  norm.x_row = rows.dim() > 1 ? rows.stride(rows.dim() - 2) : norm.dim;
  norm.residual = floats(added);
  norm.y = y.mutable_data_ptr();
  norm.r = mutable_floats(r);
  parallel(norm.rows, work_of(norm),
           [&](int64_t begin, int64_t end) { return kernels().norm_forward(norm, begin, end); });
  return {y, r};
}

std::tuple<Tensor, Tensor> add_rms_norm_backward_cpu(const OptionalTensor& dy, const OptionalTensor& dr, const Tensor& r,
                                                     const Tensor& weight, double eps) {
  if (!is_float(r) || !is_float(weight) || !is_float(dr) || (dy.has_value() && !element_of(*dy).has_value()) ||
      !has_channels(r)) {
    return call_op<Tensor, Tensor>("vim::add_rms_norm_backward_reference", dy, dr, r, weight, eps);
  }
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
  norm.dweight = mutable_floats(dweight);
  // Fixed by the shape, so that sums have one order for any number of threads.
  norm.row_groups = std::clamp<int64_t>(norm.rows / 16, 1, 64);
  const Tensor partials = allocate(r, {norm.row_groups * norm.dim}, ScalarType::Float);
  norm.partials = mutable_floats(partials);
  const Kernels& table = kernels();
  parallel(norm.row_groups, 2 * work_of(norm),
           [&](int64_t begin, int64_t end) { return table.norm_backward(norm, begin, end); });
  parallel(norm.dim, norm.row_groups * norm.dim / 10,
           [&](int64_t begin, int64_t end) { return table.norm_reduce(norm, begin, end); });
  return {total, dweight};
}

}  // namespace
}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&vim::add_rms_norm_cpu));
  m.impl("add_rms_norm_backward", TORCH_BOX(&vim::add_rms_norm_backward_cpu));
}
