// vim::bidirectional_block for key CPU: the kernels of a whole layer one after the other, products included, so that
// nothing but the pool's threads stands between them. Weights are read where they are; what is made of them (panels,
// float32 copies of half precision) lives in a task or in a call, never longer.
#include "../common/bind_block.h"

#include "products.h"
#include "run.h"
#include "values.h"

namespace vim {
namespace {

// ---- products ----------------------------------------------------------------------------------------------------

// A weight (columns, depth) as it is; its transpose is what a product by it takes.
Matrix as_it_is(const Tensor& weight) { return matrix(weight, weight.stride(0), weight.stride(1)); }

// ---- structs of the other kernels ----------------------------------------------------------------------------------

int64_t scan_work(const BlockShape& shape) { return 2 * shape.tokens() * shape.d_inner; }

Activation rows_of(const Tensor& x, const BlockShape& shape, int64_t row, int64_t offset = 0) {
  auto* bytes = static_cast<char*>(x.mutable_data_ptr());
  return {bytes + offset * static_cast<int64_t>(x.element_size()), shape.length * row, row, 1};
}

Norm norm_of(const BlockShape& shape, const float* weight, double eps) {
  Norm norm;
  norm.rows = shape.tokens();
  norm.dim = shape.d_model;
  norm.eps = static_cast<float>(eps);
  norm.weight = {weight};
  return norm;
}

void run_norm(const Norm& norm) {
  // A channel of a row costs about a tenth of a scan's channel-step.
  parallel(norm.rows, norm.rows * norm.dim / 10,
           [&](int64_t begin, int64_t end) { return kernels().norm_forward(norm, begin, end); });
}

// u of the two directions, where a pass keeps them.
using BothDirections = std::array<Activation, 2>;

Conv conv_of(const BlockShape& shape, const BlockWeights& weights, FloatWeights& values, const Tensor& xz,
             const BothDirections& u) {
  Conv conv;
  conv.element = *element_of(xz);
  conv.batch = shape.batch;
  conv.length = shape.length;
  conv.dim = shape.d_inner;
  conv.silu = true;
  conv.directions = 2;
  conv.x = rows_of(xz, shape, 2 * shape.d_inner);
  for (int d = 0; d < 2; ++d) {
    ConvDirection& side = conv.direction[d];
    side.weight = {values(weights.sides[d].conv_weight)};
    side.bias = {values(weights.sides[d].conv_bias)};
    side.width = weights.sides[d].conv_weight.size(2);
    side.reverse = d == 1;
    side.out = u[static_cast<size_t>(d)];
  }
  return conv;
}

void run_conv(const Conv& conv) {
  // A tap costs about a fifteenth of a scan's channel-step, and so does SiLU.
  parallel(kernels().conv_tasks(conv), conv.batch * conv.length * conv.dim / 4,
           [&](int64_t begin, int64_t end) { return kernels().conv_forward(conv, begin, end); });
}

StateMap state_map(const Activation& row, int64_t column, size_t element_size, int64_t dim) {
  return {static_cast<char*>(row.data) + column * static_cast<int64_t>(element_size),
          row.batch,
          0,
          1,
          row.token,
          dim,
          nullptr};
}

// x_dbl or its gradient, (2, batch, len, dt_rank + 2 d_state), of one direction.
Activation x_dbl_rows(const Tensor& x_dbl, const BlockShape& shape, int d) {
  const int64_t columns = shape.x_dbl_columns();
  return rows_of(x_dbl, shape, columns, d * shape.tokens() * columns);
}

Scan scan_of(const BlockShape& shape, const BlockWeights& weights, FloatWeights& values, const Tensor& xz,
             const BothDirections& u, const Tensor& x_dbl, const Tensor& checkpoints, double scale) {
  Scan scan;
  scan.element = scan.row_element = *element_of(xz);
  scan.batch = shape.batch;
  scan.length = shape.length;
  scan.dim = shape.d_inner;
  scan.d_state = shape.d_state;
  scan.dt_rank = shape.dt_rank;
  scan.softplus = scan.A_is_log = true;
  scan.scale = static_cast<float>(scale);
  scan.checkpoint_every = shape.checkpoint_every;
  scan.directions = 2;
  scan.z = rows_of(xz, shape, 2 * shape.d_inner, shape.d_inner);
  for (int d = 0; d < 2; ++d) {
    ScanDirection& side = scan.direction[d];
    const BlockDirection& w = weights.sides[d];
    side.u = u[static_cast<size_t>(d)];
    side.dt = x_dbl_rows(x_dbl, shape, d);
    side.B = state_map(side.dt, shape.dt_rank, x_dbl.element_size(), shape.d_inner);
    side.C = state_map(side.dt, shape.dt_rank + shape.d_state, x_dbl.element_size(), shape.d_inner);
    side.dt_weight = {values(w.dt_weight)};
    side.bias = {values(w.dt_bias)};
    side.A = {values(w.A_log)};
    side.D = {values(w.D)};
    side.reverse = d == 1;
    if (shape.checkpoint_every > 0) {
      side.checkpoints = mutable_floats(checkpoints) + d * checkpoints.numel() / 2;
    }
  }
  return scan;
}

// ---- forward -------------------------------------------------------------------------------------------------------

BlockResults run_forward(const BlockShape& shape, const BlockWeights& weights, const Tensor& hidden_states,
                         const OptionalTensor& residual, ScalarType type, double eps, double scale) {
  const int64_t tokens = shape.tokens(), model = shape.d_model, inner = shape.d_inner;
  const int64_t columns = shape.x_dbl_columns();
  // Without a backward pass u takes the place of x.
  const bool keeps = shape.checkpoint_every > 0;
  FloatWeights values;
  // What outlives the call comes first, so that no gap is left between it when the rest is freed.
  const Tensor out = allocate(hidden_states, shape.rows(model), type);
  const Tensor sum = allocate(hidden_states, shape.rows(model), ScalarType::Float);
  const Tensor xz = allocate(hidden_states, shape.rows(2 * inner), type);
  const Tensor x_dbl = allocate(hidden_states, {2, shape.batch, shape.length, columns}, type);
  const Tensor states = allocate(hidden_states, shape.checkpoints(), ScalarType::Float);
  const Tensor rows = allocate(hidden_states, {keeps ? 2 : 1, tokens, inner}, type);

  const Tensor& normed = out;  // in its place
  const Tensor x = as_rows(hidden_states);
  const OptionalTensor added = dense(residual);
  Norm norm = norm_of(shape, values(weights.norm_weight), eps);
  norm.element = *element_of(x);
  norm.y_element = *element_of(normed);
  norm.x = x.const_data_ptr();
  norm.x_row = row_stride(x);
  norm.residual = floats(added);
  norm.y = normed.mutable_data_ptr();
  norm.r = mutable_floats(sum);
  run_norm(norm);
  multiply({product(tokens, model, 2 * inner, matrix(normed, model), transposed(as_it_is(weights.in_proj)),
                    target(xz, 2 * inner), values(weights.in_bias))});

  const BothDirections u{keeps ? rows_of(rows, shape, inner, tokens * inner) : rows_of(xz, shape, 2 * inner),
                         rows_of(rows, shape, inner)};
  run_conv(conv_of(shape, weights, values, xz, u));
  const Element element = *element_of(xz);
  const auto x_proj = [&](size_t d) {
    return product(tokens, inner, columns, {element, u[d].data, u[d].token, 1},
                   transposed(as_it_is(weights.sides[d].x_proj)),
                   target(x_dbl, columns, static_cast<int64_t>(d) * tokens * columns));
  };
  multiply({x_proj(0), x_proj(1)});

  OptionalTensor wide_rows;
  Scan scan = scan_of(shape, weights, values, xz, u, x_dbl, states, scale);
  // A block of channels has read its part of the forward direction's u before it writes y.
  scan.y = u[0];
  scan = with_float_rows(scan, xz, wide_rows);
  parallel(kernels().scan_tasks(scan), scan_work(shape),
           [&](int64_t begin, int64_t end) { return kernels().scan_forward(scan, begin, end); });
  multiply({product(tokens, inner, model, {element, u[0].data, u[0].token, 1}, transposed(as_it_is(weights.out_proj)),
                    target(out, model), values(weights.out_bias))});
  if (!keeps) return {out, sum, absent(out, type), absent(out, type), absent(out, ScalarType::Float)};
  return {out, sum, xz, x_dbl, states};
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Memory for the gradients of weights: float32 where kernels write them, the weight's own dtype where products do.
// Empty for absent weights, and for the weights of products unless `weight_grads`.
BlockWeights allocate_grads(const BlockWeights& weights, bool weight_grads) {
  const auto of_kernel = [](const Tensor& w) { return allocate(w, sizes_of(w), ScalarType::Float); };
  const auto of_product = [&](const Tensor& w) { return weight_grads ? allocate_like(w) : absent(w, w.scalar_type()); };
  const auto optional = [&](const OptionalTensor& w, const auto& allocate_for) {
    return w.has_value() ? allocate_for(*w) : absent(weights.out_proj, ScalarType::Float);
  };
  const auto of_side = [&](const BlockDirection& w) {
    return BlockDirection{of_kernel(w.conv_weight),
                          optional(w.conv_bias, of_kernel),
                          of_product(w.x_proj),
                          of_kernel(w.dt_weight),
                          of_kernel(w.dt_bias),
                          of_kernel(w.A_log),
                          of_kernel(w.D)};
  };
  return {of_kernel(weights.norm_weight),        of_product(weights.in_proj),
          optional(weights.in_bias, of_product), {of_side(weights.sides[0]), of_side(weights.sides[1])},
          of_product(weights.out_proj),          optional(weights.out_bias, of_product)};
}

std::vector<Tensor> run_backward(const BlockShape& shape, const BlockWeights& weights, const Tensor& dout,
                                 const OptionalTensor& dresidual, const Tensor& residual, const Tensor& xz,
                                 const Tensor& given_x_dbl, const Tensor& checkpoints, double eps, double scale,
                                 bool weight_grads) {
  const Tensor x_dbl = dense(given_x_dbl);
  const Kernels& table = kernels();
  const int64_t tokens = shape.tokens(), model = shape.d_model, inner = shape.d_inner;
  const int64_t columns = shape.x_dbl_columns();
  const ScalarType type = xz.scalar_type();
  const BlockDirection(&sides)[2] = weights.sides;
  FloatWeights values;
  // What outlives the call comes first, so that no gap is left between it when the rest is freed.
  const Tensor total = allocate_like(residual);
  const BlockWeights grads = allocate_grads(weights, weight_grads);
  const auto of_tokens = [&](const Sizes& sizes) { return allocate(xz, sizes, type); };
  // A row of ones sums a matrix over its rows.
  static const float one = 1.0f;
  const Matrix ones{Element::float32, &one, 0, 0};

  const Tensor u = of_tokens({2, tokens, inner}), du = of_tokens({2, tokens, inner});
  const BothDirections rows_of_u{rows_of(u, shape, inner), rows_of(u, shape, inner, tokens * inner)};
  Conv conv = conv_of(shape, weights, values, xz, rows_of_u);
  run_conv(conv);

  // Through out_proj and the scans. y of the forward pass takes the place of its gradient.
  const Tensor dy = of_tokens({tokens, inner}), dx_dbl = of_tokens({2, shape.batch, shape.length, columns});
  const Tensor dxz = of_tokens(shape.rows(2 * inner));
  multiply({product(tokens, model, inner, matrix(dout, model), as_it_is(weights.out_proj), target(dy, inner))});
  ScanBackwardTasks k{};
  k.scan = scan_of(shape, weights, values, xz, rows_of_u, x_dbl, checkpoints, scale);
  k.dy = k.y = rows_of(dy, shape, inner);
  k.dz = rows_of(dxz, shape, 2 * inner, inner);
  for (int d = 0; d < 2; ++d) {
    ScanDirectionGrads& side = k.grads[d];
    side.du = rows_of(du, shape, inner, d * tokens * inner);
    side.ddt = x_dbl_rows(dx_dbl, shape, d);
    side.dB = state_map(side.ddt, shape.dt_rank, dx_dbl.element_size(), inner);
    side.dC = state_map(side.ddt, shape.dt_rank + shape.d_state, dx_dbl.element_size(), inner);
    side.ddt_weight = {mutable_floats(grads.sides[d].dt_weight)};
    side.dbias = {mutable_floats(grads.sides[d].dt_bias)};
    side.dA = {mutable_floats(grads.sides[d].A_log)};
    side.dD = {mutable_floats(grads.sides[d].D)};
  }
  k.partition = table.scan_partition(k.scan);
  {
    const Tensor shared = allocate(xz, {k.partition.shared_floats}, ScalarType::Float);
    const Tensor partials = allocate(xz, {k.partition.weight_floats}, ScalarType::Float);
    k.shared = mutable_floats(shared);
    k.weights = mutable_floats(partials);
    run_scan_backward(k);
  }
  if (weight_grads) {
    multiply({product(model, tokens, inner, transposed(matrix(dout, model)), matrix(dy, inner),
                      target(grads.out_proj, inner))});
    if (weights.out_bias.has_value()) {
      multiply({product(1, tokens, model, ones, matrix(dout, model), target(*grads.out_bias, model))});
    }
  }

  // Through x_proj and the convolutions.
  const auto rows_d = [&](const Tensor& x, int64_t row, int64_t d) { return matrix(x, row, 1, d * tokens * row); };
  const auto to_u = [&](int d) {
    return product(tokens, columns, inner, rows_d(dx_dbl, columns, d), as_it_is(sides[d].x_proj),
                   target(du, inner, d * tokens * inner), nullptr, true);
  };
  multiply({to_u(0), to_u(1)});
  if (weight_grads) {
    const auto to_weight = [&](int d) {
      return product(columns, tokens, inner, transposed(rows_d(dx_dbl, columns, d)), rows_d(u, inner, d),
                     target(grads.sides[d].x_proj, inner));
    };
    multiply({to_weight(0), to_weight(1)});
  }
  conv.dx = rows_of(dxz, shape, 2 * inner);
  for (int d = 0; d < 2; ++d) {
    conv.direction[d].dout = rows_of(du, shape, inner, d * tokens * inner);
    conv.direction[d].dweight = {mutable_floats(grads.sides[d].conv_weight)};
    conv.direction[d].dbias = {sides[d].conv_bias.has_value() ? mutable_floats(*grads.sides[d].conv_bias) : nullptr};
  }
  run_conv_backward(conv, xz);

  // Through in_proj and the norm.
  const Tensor normed = of_tokens({tokens, model});
  const float* norm_weight = values(weights.norm_weight);
  if (weight_grads) {
    Norm norm = norm_of(shape, norm_weight, eps);
    norm.y_element = *element_of(normed);
    norm.x = residual.const_data_ptr();
    norm.x_row = model;
    norm.y = normed.mutable_data_ptr();
    run_norm(norm);
    multiply({product(2 * inner, tokens, model, transposed(matrix(dxz, 2 * inner)), matrix(normed, model),
                      target(grads.in_proj, model))});
    if (weights.in_bias.has_value()) {
      multiply({product(1, tokens, 2 * inner, ones, matrix(dxz, 2 * inner), target(*grads.in_bias, 2 * inner))});
    }
  }
  const Tensor& dnormed = normed;  // in its place
  multiply(
      {product(tokens, 2 * inner, model, matrix(dxz, 2 * inner), as_it_is(weights.in_proj), target(dnormed, model))});
  Norm norm = norm_of(shape, norm_weight, eps);
  norm.element = *element_of(dnormed);
  norm.dy = dnormed.const_data_ptr();
  norm.dr = floats(dresidual);
  norm.r = const_cast<float*>(floats(residual));
  norm.total = mutable_floats(total);
  norm.dweight = {mutable_floats(grads.norm_weight)};
  run_norm_backward(norm, xz);

  std::vector<Tensor> out{total};
  const auto given = weights.list(), found = grads.list();
  for (size_t i = 0; i < kBlockWeights; ++i) {
    const bool differs = given[i] != nullptr && !same_type(*found[i], *given[i]);
    out.push_back(differs ? torch::stable::to(*found[i], given[i]->scalar_type()) : *found[i]);
  }
  return out;
}

}  // namespace
}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { vim::implement_block(m, ""); }
