// vim::bidirectional_block for GPUs: our kernels and PyTorch's products, started from C++ so that a layer is one call.
#include "../common/bind_block.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "binding.h"
#include "convert.h"
#include "ops.h"

// PyTorch's products as its C interface has them: in place, and without a dispatcher between.
#if defined(VIM_EMULATED)
#define VIM_ATEN(name) aoti_torch_cpu_##name
#else
#define VIM_ATEN(name) aoti_torch_cuda_##name
#endif

extern "C" {
AOTITorchError VIM_ATEN(mm_out)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
AOTITorchError VIM_ATEN(addmm_out)(AtenTensorHandle out, AtenTensorHandle added, AtenTensorHandle a, AtenTensorHandle b,
                                   double beta, double alpha);
}

namespace vim {
namespace {

// ---- views and products ------------------------------------------------------------------------------------------

Tensor view(const Tensor& x, const Sizes& sizes, const Sizes& strides, int64_t offset = 0) {
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.data(), strides.data(), offset, &result));
  return Tensor(result);
}

// Matrices (rows, columns), `stride` numbers from one row to the next.
Tensor matrix(const Tensor& x, int64_t rows, int64_t columns, int64_t stride, int64_t offset = 0) {
  return view(x, {rows, columns}, {stride, 1}, offset);
}

Tensor transposed(const Tensor& m) { return view(m, {m.size(1), m.size(0)}, {m.stride(1), m.stride(0)}); }

// Activations (batch, len, columns) of memory whose rows are `stride` numbers apart.
Tensor activation(const Tensor& x, const BlockShape& shape, int64_t columns, int64_t stride, int64_t offset = 0) {
  return view(x, shape.rows(columns), {shape.length * stride, stride, 1}, offset);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(VIM_ATEN(mm_out)(out.get(), a.get(), b.get()));
}

// out = added + a b; `added` may be out, or a vector for every row
void multiply_and_add(const Tensor& added, const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(VIM_ATEN(addmm_out)(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
}

// out = x weight^T + bias
void project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  if (bias.has_value()) {
    multiply_and_add(*bias, x, transposed(weight), out);
  } else {
    multiply(x, transposed(weight), out);
  }
}

// ---- weights -------------------------------------------------------------------------------------------------------

// From, to: contiguous tensors of the same sizes.
using Conversion = std::pair<Tensor, Tensor>;

// Converts all, with one kernel for each pair of types.
void convert(std::vector<Conversion> all) {
  while (!all.empty()) {
    const Element from = *element_of(all[0].first), to = *element_of(all[0].second);
    const auto rest = std::partition(all.begin(), all.end(), [&](const Conversion& c) {
      return *element_of(c.first) == from && *element_of(c.second) == to;
    });
    const OnDeviceOf device(all[0].first);
    cuda::Conversions arrays;
    for (auto c = all.begin(); c != rest; ++c) {
      arrays.from[arrays.count] = read_only(c->first);
      arrays.to[arrays.count] = c->second.mutable_data_ptr();
      arrays.size[arrays.count++] = c->first.numel();
    }
    cuda::convert(arrays, from, to, device.stream());
    all.erase(all.begin(), rest);
  }
}

// Weights of one op; in float32 where their types differ.
void unify(const std::vector<Tensor*>& weights) {
  const auto same = [&](const Tensor* x) { return same_type(*x, *weights[0]); };
  if (std::all_of(weights.begin(), weights.end(), same)) return;
  for (Tensor* x : weights) *x = torch::stable::to(*x, ScalarType::Float);
}

// The products' weights in the type of activations, for one call, in the memory of one tensor. Our kernels read the
// other weights as they are.
BlockWeights converted(const BlockWeights& weights, ScalarType type) {
  const auto room = [](const Tensor& x) { return (x.numel() + 15) / 16 * 16; };  // for vectors of the next one
  BlockWeights result = weights;
  std::vector<Tensor*> products{&result.in_proj, &result.sides[0].x_proj, &result.sides[1].x_proj, &result.out_proj};
  for (OptionalTensor* w : {&result.in_bias, &result.out_bias}) {
    if (w->has_value()) products.push_back(&**w);
  }
  std::vector<Tensor*> convolutions, scans;
  for (BlockDirection& side : result.sides) {
    convolutions.push_back(&side.conv_weight);
    if (side.conv_bias.has_value()) convolutions.push_back(&*side.conv_bias);
    for (Tensor* w : {&side.dt_weight, &side.dt_bias, &side.A_log, &side.D}) scans.push_back(w);
  }
  unify(convolutions);
  unify(scans);
  int64_t total = 0;
  for (Tensor* x : products) {
    *x = dense(*x);
    if (x->scalar_type() != type) total += room(*x);
  }
  if (total == 0) return result;
  const Tensor memory = allocate(result.in_proj, {total}, type);
  std::vector<Conversion> conversions;
  int64_t offset = 0;
  for (Tensor* x : products) {
    if (x->scalar_type() == type) continue;
    const Tensor target = view(memory, sizes_of(*x), strides_of(*x), offset);
    offset += room(*x);
    conversions.emplace_back(*x, target);
    *x = target;
  }
  convert(std::move(conversions));
  return result;
}

on_cuda::ScanSide scan_side(const BlockDirection& weights, const Tensor& u, const Tensor& x_dbl) {
  return {u, x_dbl, weights.dt_weight, weights.dt_bias, weights.A_log, weights.D};
}

// ---- layout --------------------------------------------------------------------------------------------------------

// Rows of x_dbl start at multiples of 16 bytes, which threads load at once.
int64_t x_dbl_stride(const BlockShape& shape) { return (shape.x_dbl_columns() + 7) / 8 * 8; }

Tensor allocate_x_dbl(const Tensor& like, const BlockShape& shape, ScalarType type) {
  const int64_t stride = x_dbl_stride(shape);
  const Tensor rows = allocate(like, {2, shape.batch, shape.length, stride}, type);
  return view(rows, {2, shape.batch, shape.length, shape.x_dbl_columns()},
              {shape.tokens() * stride, shape.length * stride, stride, 1});
}

// One direction of x_dbl or its gradient.
Tensor direction(const Tensor& x_dbl, const BlockShape& shape, int64_t d) {
  return view(x_dbl, shape.rows(x_dbl.size(3)), {x_dbl.stride(1), x_dbl.stride(2), x_dbl.stride(3)},
              d * x_dbl.stride(0));
}

Tensor as_matrix(const Tensor& activation, const BlockShape& shape) {
  return matrix(activation, shape.tokens(), activation.size(2), activation.stride(1));
}

// ---- forward -------------------------------------------------------------------------------------------------------

BlockResults run_forward(const BlockShape& shape, const BlockWeights& given, const Tensor& hidden_states,
                         const OptionalTensor& residual, ScalarType type, double eps, double scale) {
  const BlockWeights weights = converted(given, type);
  const int64_t tokens = shape.tokens(), inner = shape.d_inner;
  const auto [normed, sum] = on_cuda::add_rms_norm(hidden_states, residual, weights.norm_weight, eps, type);
  const Tensor xz = allocate(hidden_states, shape.rows(2 * inner), type);
  project(as_matrix(normed, shape), weights.in_proj, weights.in_bias, as_matrix(xz, shape));
  const Tensor x = activation(xz, shape, inner, 2 * inner), z = activation(xz, shape, inner, 2 * inner, inner);
  const BlockDirection &forward = weights.sides[0], &backward = weights.sides[1];
  const auto [u, u_b] = on_cuda::bidirectional_conv1d(x, forward.conv_weight, forward.conv_bias, backward.conv_weight,
                                                      backward.conv_bias);
  const Tensor x_dbl = allocate_x_dbl(hidden_states, shape, type);
  const Tensor rows[2] = {direction(x_dbl, shape, 0), direction(x_dbl, shape, 1)};
  project(matrix(u, tokens, inner, inner), forward.x_proj, std::nullopt, as_matrix(rows[0], shape));
  project(matrix(u_b, tokens, inner, inner), backward.x_proj, std::nullopt, as_matrix(rows[1], shape));
  const auto [y, states] = on_cuda::bidirectional_scan(
      scan_side(forward, u, rows[0]), scan_side(backward, u_b, rows[1]), z, scale, shape.checkpoint_every);
  const Tensor out = allocate(hidden_states, shape.rows(shape.d_model), type);
  project(as_matrix(y, shape), weights.out_proj, weights.out_bias, as_matrix(out, shape));
  if (shape.checkpoint_every == 0) {
    return {out, sum, absent(out, type), absent(out, type), absent(out, ScalarType::Float)};
  }
  return {out, sum, xz, x_dbl, states};
}

// ---- backward ------------------------------------------------------------------------------------------------------

std::vector<Tensor> run_backward(const BlockShape& shape, const BlockWeights& given, const Tensor& dout,
                                 const OptionalTensor& dresidual, const Tensor& residual, const Tensor& xz,
                                 const Tensor& x_dbl, const Tensor& checkpoints, double eps, double scale,
                                 bool weight_grads) {
  const ScalarType type = xz.scalar_type();
  const BlockWeights weights = converted(given, type);
  const int64_t tokens = shape.tokens(), inner = shape.d_inner, model = shape.d_model;
  const BlockDirection &forward = weights.sides[0], &backward = weights.sides[1];
  const auto dense_rows = [&](const Tensor& x, int64_t columns) { return matrix(x, tokens, columns, columns); };
  std::vector<Conversion> conversions;
  // A gradient in the type of its weight, once the conversions have run.
  const auto like_weight = [&](const Tensor& gradient, ScalarType wanted) {
    if (gradient.scalar_type() == wanted) return gradient;
    return conversions.emplace_back(gradient, allocate(gradient, sizes_of(gradient), wanted)).second;
  };
  // dc^T a, the gradient of a product's weight
  const auto weight_gradient = [&](const Tensor& dc, const Tensor& a, const Tensor& weight) {
    if (!weight_grads) return absent(xz, weight.scalar_type());
    const Tensor gradient = allocate(xz, {dc.size(1), a.size(1)}, type);
    multiply(transposed(dc), a, gradient);
    return like_weight(gradient, weight.scalar_type());
  };
  const auto bias_gradient = [&](const Tensor& dc, const OptionalTensor& bias) {
    if (!bias.has_value() || !weight_grads)
      return absent(xz, bias.has_value() ? bias->scalar_type() : ScalarType::Float);
    const std::vector<int64_t> rows{0};
    return like_weight(
        std::get<0>(call_overload<Tensor>("aten::sum", "dim_IntList", dc, std::optional<std::vector<int64_t>>(rows),
                                          false, std::optional<ScalarType>(ScalarType::Float))),
        bias->scalar_type());
  };

  const Tensor x = activation(xz, shape, inner, 2 * inner), z = activation(xz, shape, inner, 2 * inner, inner);
  const auto [u, u_b] = on_cuda::bidirectional_conv1d(x, forward.conv_weight, forward.conv_bias, backward.conv_weight,
                                                      backward.conv_bias);
  const Tensor rows_of_dout = dense_rows(dout, model);
  const Tensor dy = allocate(xz, shape.rows(inner), type), dxz = allocate(xz, shape.rows(2 * inner), type);
  multiply(rows_of_dout, weights.out_proj, dense_rows(dy, inner));
  const Tensor dz = activation(dxz, shape, inner, 2 * inner, inner), dx_dbls = allocate_x_dbl(xz, shape, type);
  const std::vector<Tensor> scans = on_cuda::scan_gradients(
      dy, scan_side(forward, u, direction(x_dbl, shape, 0)), scan_side(backward, u_b, direction(x_dbl, shape, 1)), z,
      checkpoints, scale, shape.checkpoint_every, dz, {direction(dx_dbls, shape, 0), direction(dx_dbls, shape, 1)});
  const Tensor dout_proj = weight_gradient(rows_of_dout, dense_rows(dy, inner), given.out_proj);
  const Tensor dout_bias = bias_gradient(rows_of_dout, given.out_bias);
  const Tensor inputs[2] = {dense_rows(u, inner), dense_rows(u_b, inner)};
  Tensor dx_proj[2];
  for (size_t d = 0; d < 2; ++d) {
    const Tensor du = dense_rows(scans[6 * d], inner), dx_dbl = as_matrix(scans[6 * d + 1], shape);
    multiply_and_add(du, dx_dbl, weights.sides[d].x_proj, du);
    dx_proj[d] = weight_gradient(dx_dbl, inputs[d], given.sides[d].x_proj);
  }
  const auto [dconv, dconv_bias, dconv_b, dconv_bias_b] =
      on_cuda::conv_gradients(scans[0], scans[6], x, forward.conv_weight, forward.conv_bias, backward.conv_weight,
                              backward.conv_bias, activation(dxz, shape, inner, 2 * inner));
  const Tensor rows_of_dxz = dense_rows(dxz, 2 * inner);
  Tensor din_proj = absent(xz, given.in_proj.scalar_type());
  if (weight_grads) {
    const Tensor normed = std::get<0>(on_cuda::add_rms_norm(residual, std::nullopt, weights.norm_weight, eps, type));
    din_proj = weight_gradient(rows_of_dxz, dense_rows(normed, model), given.in_proj);
  }
  const Tensor din_bias = bias_gradient(rows_of_dxz, given.in_bias);
  const Tensor dnormed = allocate(xz, shape.rows(model), type);
  multiply(rows_of_dxz, weights.in_proj, dense_rows(dnormed, model));
  const auto [total, dnorm] = on_cuda::add_rms_norm_backward(dnormed, dresidual, residual, weights.norm_weight, eps);

  std::vector<Tensor> out{total, dnorm, din_proj, din_bias};
  for (size_t d = 0; d < 2; ++d) {
    const BlockDirection& w = given.sides[d];
    const Tensor& bias = d == 0 ? dconv_bias : dconv_bias_b;
    out.push_back(like_weight(d == 0 ? dconv : dconv_b, w.conv_weight.scalar_type()));
    out.push_back(w.conv_bias.has_value() ? like_weight(bias, w.conv_bias->scalar_type()) : bias);
    out.push_back(dx_proj[d]);
    const Tensor* like[] = {&w.dt_weight, &w.dt_bias, &w.A_log, &w.D};
    for (size_t i = 0; i < 4; ++i) out.push_back(like_weight(scans[6 * d + 2 + i], like[i]->scalar_type()));
  }
  convert(std::move(conversions));
  out.push_back(dout_proj);
  out.push_back(dout_bias);
  return out;
}

}  // namespace
}  // namespace vim

VIM_DEVICE_IMPL(m) { vim::implement_block(m, vim::kFamily); }
