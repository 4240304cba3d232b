// vim::selective_scan, vim::segmented_scan and vim::bidirectional_scan, forward and backward, for any device: checks,
// outputs, and the structs that kernels read. Float64, a complex A and mixed dtypes go to the reference, which is
// registered under a name of its own. Included once per library.
#pragma once

#include <string>

#include "binding.h"

namespace vim {
namespace {

int64_t chunks_of(int64_t length, int64_t every) { return every == 0 ? 0 : (length + every - 1) / every; }

// The distance between saved states that kernels are given. Sequences are shorter than most integers: beyond their end
// all distances mean the same, and kernels multiply this one. A multiple of 64 stays one, since kernels are fast for
// it.
int64_t checkpoint_distance(int64_t every, int64_t length, bool backward) {
  STD_TORCH_CHECK(every > 0 || (every == 0 && !backward), "vim: checkpoint_every must be positive");
  return std::min(every, length / 64 * 64 + 64);
}

// What each device supplies: both run a scan whose arguments are known to fit. `like` is where workspace is allocated.
void run_forward(const Scan& scan, const Tensor& like);
void run_backward(const ScanBackward& backward, const Tensor& like);

// ---- selective_scan: activations are (batch, dim, len) ----------------------------------------------------------

// B or C, or the gradient of one: (dim, d_state), (batch, d_state, len) or (batch, groups, d_state, len).
StateMap state_map(const Tensor& x, void* data, int64_t dim) {
  StateMap map;
  map.channels_per_group = dim;
  if (x.dim() == 2) return map;
  const bool grouped = x.dim() == 4;
  map.data = data;
  map.batch = x.stride(0);
  map.group = grouped ? x.stride(1) : 0;
  map.state = x.stride(grouped ? 2 : 1);
  map.token = x.stride(grouped ? 3 : 2);
  map.channels_per_group = grouped ? dim / x.size(1) : dim;
  return map;
}

struct SelectiveInputs {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias;
  OptionalTensor initial_state = std::nullopt, seq_idx = std::nullopt;

  bool supported() const {
    const auto map_fits = [&](const Tensor& x) { return x.dim() == 2 ? is_float(x) : same_type(x, u); };
    return element_of(u).has_value() && same_type(delta, u) && is_float(A) && map_fits(B) && map_fits(C) &&
           is_float(D) && same_type(z, u) && is_float(delta_bias) && is_float(initial_state) &&
           (!seq_idx.has_value() || seq_idx->scalar_type() == ScalarType::Int) && u.size(1) > 0 && A.size(1) > 0;
  }

  void check() const {
    const Sizes sizes = sizes_of(u);
    STD_TORCH_CHECK(sizes.size() == 3, "vim: u must be (batch, dim, len)");
    const int64_t batch = sizes[0], dim = sizes[1], length = sizes[2], d_state = A.size(1);
    check_extent({batch, dim, length, d_state});
    for (const Tensor* x : {&delta, &A, &B, &C}) check_device("delta, A, B or C", *x, u);
    for (const OptionalTensor* x : {&D, &z, &delta_bias}) check_device("D, z or delta_bias", *x, u);
    for (const OptionalTensor* x : {&initial_state, &seq_idx}) check_device("initial_state or seq_idx", *x, u);
    check_memory("u", u);
    check_sizes("delta", delta, sizes);
    check_sizes("A", A, {dim, d_state});
    for (const Tensor* x : {&B, &C}) {
      const char* name = x == &B ? "B" : "C";
      if (x->dim() == 2) {
        check_sizes(name, *x, {dim, d_state});
      } else if (x->dim() == 3) {
        check_sizes(name, *x, {batch, d_state, length});
      } else {
        check_sizes(name, *x, {batch, x->size(1), d_state, length});
        STD_TORCH_CHECK(x->size(1) > 0 && dim % x->size(1) == 0, "vim: groups must divide dim");
      }
    }
    check_sizes("D", D, {dim});
    check_sizes("z", z, sizes);
    check_sizes("delta_bias", delta_bias, {dim});
    check_sizes("initial_state", initial_state, {batch, dim, d_state});
    check_sizes("seq_idx", seq_idx, {batch, length});
  }

  void make_dense() {
    A = dense(A);
    if (B.dim() == 2) B = dense(B);
    if (C.dim() == 2) C = dense(C);
    D = dense(D);
    delta_bias = dense(delta_bias);
    initial_state = dense(initial_state);
    seq_idx = dense(seq_idx);
  }

  Scan scan(bool softplus, bool reverse) const {
    Scan scan;
    scan.element = scan.row_element = *element_of(u);
    scan.batch = u.size(0);
    scan.dim = u.size(1);
    scan.length = u.size(2);
    scan.d_state = A.size(1);
    scan.softplus = softplus;
    if (z.has_value()) scan.z = input(*z, 0, 2, 1);
    if (seq_idx.has_value()) scan.seq_idx = static_cast<const int32_t*>(seq_idx->const_data_ptr());
    ScanDirection& side = scan.direction[0];
    side.u = input(u, 0, 2, 1);
    side.delta = input(delta, 0, 2, 1);
    // A tensor without elements may have no memory; the kernels take null for "not given".
    static char nothing;
    if (side.delta.data == nullptr) side.delta.data = &nothing;
    side.bias = weight_of(delta_bias);
    side.A = weight_of(A);
    side.D = weight_of(D);
    side.B = state_map(B, read_only(B), scan.dim);
    side.C = state_map(C, read_only(C), scan.dim);
    if (B.dim() == 2) side.B.constant = floats(B);
    if (C.dim() == 2) side.C.constant = floats(C);
    side.reverse = reverse;
    side.initial_state = floats(initial_state);
    return scan;
  }
};

std::tuple<Tensor, Tensor, Tensor> run_selective(SelectiveInputs inputs, bool delta_softplus, bool reverse,
                                                 int64_t checkpoint_every) {
  inputs.check();
  inputs.make_dense();
  Scan scan = inputs.scan(delta_softplus, reverse);
  scan.checkpoint_every = checkpoint_distance(checkpoint_every, scan.length, false);
  const int64_t chunks = chunks_of(scan.length, scan.checkpoint_every);
  const Tensor& u = inputs.u;
  const Tensor out = allocate_like_layout(u);
  const Tensor last_state = allocate(inputs.A, {scan.batch, scan.dim, scan.d_state});
  const Tensor checkpoints = allocate(inputs.A, {scan.batch, chunks, scan.d_state, scan.dim});
  scan.y = output(out, 0, 2, 1);
  scan.direction[0].last_state = mutable_floats(last_state);
  if (scan.checkpoint_every > 0) scan.direction[0].checkpoints = mutable_floats(checkpoints);
  run_forward(scan, u);
  return {out, last_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  bool delta_softplus, bool reverse, int64_t checkpoint_every) {
  const SelectiveInputs inputs{u, delta, A, B, C, D, z, delta_bias};
  if (!inputs.supported()) {
    return call_op<Tensor, Tensor, Tensor>("vim::selective_scan_reference", u, delta, A, B, C, D, z, delta_bias,
                                           delta_softplus, reverse, checkpoint_every);
  }
  return run_selective(inputs, delta_softplus, reverse, checkpoint_every);
}

std::tuple<Tensor, Tensor, Tensor> segmented_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                                                  bool delta_softplus, bool reverse, int64_t checkpoint_every) {
  const SelectiveInputs inputs{u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx};
  if (!inputs.supported()) {
    return call_op<Tensor, Tensor, Tensor>("vim::segmented_scan_reference", u, delta, A, B, C, D, z, delta_bias,
                                           initial_state, seq_idx, delta_softplus, reverse, checkpoint_every);
  }
  return run_selective(inputs, delta_softplus, reverse, checkpoint_every);
}

using SelectiveGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SegmentedGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SegmentedGrads selective_gradients(const Tensor& dout, const OptionalTensor& dlast_state, SelectiveInputs inputs,
                                   const Tensor& checkpoints, bool delta_softplus, bool reverse,
                                   int64_t checkpoint_every) {
  inputs.check();
  inputs.make_dense();
  ScanBackward k;
  k.scan = inputs.scan(delta_softplus, reverse);
  Scan& scan = k.scan;
  scan.checkpoint_every = checkpoint_distance(checkpoint_every, scan.length, true);
  const Tensor &u = inputs.u, &A = inputs.A, &B = inputs.B, &C = inputs.C;
  const OptionalTensor &D = inputs.D, &z = inputs.z, &delta_bias = inputs.delta_bias;
  check_device("dout", dout, u);
  check_device("dlast_state", dlast_state, u);
  check_device("checkpoints", checkpoints, u);
  check_sizes("dout", dout, sizes_of(u));
  check_sizes("dlast_state", dlast_state, {scan.batch, scan.dim, scan.d_state});
  const int64_t chunks = chunks_of(scan.length, scan.checkpoint_every);
  check_sizes("checkpoints", checkpoints, {scan.batch, chunks, scan.d_state, scan.dim});
  const Tensor states = dense(checkpoints);
  const OptionalTensor dlast = dense(dlast_state);
  scan.direction[0].checkpoints = const_cast<float*>(floats(states));
  const Tensor du = allocate_like_layout(u), ddelta = allocate_like_layout(inputs.delta);
  const Tensor dA = allocate_like(A), dB = allocate_like(B), dC = allocate_like(C);
  const Tensor dD = D.has_value() ? allocate_like(*D) : absent(u, ScalarType::Float);
  const Tensor dz = z.has_value() ? allocate_like_layout(*z) : absent(u, u.scalar_type());
  const Tensor dbias = delta_bias.has_value() ? allocate_like(*delta_bias) : absent(u, ScalarType::Float);
  const Tensor dinitial =
      inputs.initial_state.has_value() ? allocate_like(*inputs.initial_state) : absent(u, ScalarType::Float);
  k.dy = input(dout, 0, 2, 1);
  if (z.has_value()) k.dz = output(dz, 0, 2, 1);
  ScanDirectionGrads& grads = k.grads[0];
  grads.du = output(du, 0, 2, 1);
  grads.ddelta = output(ddelta, 0, 2, 1);
  grads.dA = gradient_of(dA);
  grads.dB = state_map(dB, dB.mutable_data_ptr(), scan.dim);
  grads.dC = state_map(dC, dC.mutable_data_ptr(), scan.dim);
  if (B.dim() == 2) grads.dB_constant = mutable_floats(dB);
  if (C.dim() == 2) grads.dC_constant = mutable_floats(dC);
  if (D.has_value()) grads.dD = gradient_of(dD);
  if (delta_bias.has_value()) grads.dbias = gradient_of(dbias);
  grads.dlast_state = floats(dlast);
  if (inputs.initial_state.has_value()) grads.dinitial_state = mutable_floats(dinitial);
  run_backward(k, u);
  return {du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial};
}

SelectiveGrads selective_scan_backward(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& u,
                                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                       const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& delta_bias, const Tensor& checkpoints, bool delta_softplus,
                                       bool reverse, int64_t checkpoint_every) {
  const SelectiveInputs inputs{u, delta, A, B, C, D, z, delta_bias};
  if (!inputs.supported() || !same_type(dout, u) || !is_float(dlast_state) || !is_float(checkpoints)) {
    return call_op<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        "vim::selective_scan_backward_reference", dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, checkpoints,
        delta_softplus, reverse, checkpoint_every);
  }
  const auto [du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial] =
      selective_gradients(dout, dlast_state, inputs, checkpoints, delta_softplus, reverse, checkpoint_every);
  return {du, ddelta, dA, dB, dC, dD, dz, dbias};
}

SegmentedGrads segmented_scan_backward(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& u,
                                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                       const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                       const OptionalTensor& seq_idx, const Tensor& checkpoints, bool delta_softplus,
                                       bool reverse, int64_t checkpoint_every) {
  const SelectiveInputs inputs{u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx};
  if (!inputs.supported() || !same_type(dout, u) || !is_float(dlast_state) || !is_float(checkpoints)) {
    return call_op<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        "vim::segmented_scan_backward_reference", dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state,
        seq_idx, checkpoints, delta_softplus, reverse, checkpoint_every);
  }
  return selective_gradients(dout, dlast_state, inputs, checkpoints, delta_softplus, reverse, checkpoint_every);
}

// ---- bidirectional_scan: activations are (batch, len, dim) ------------------------------------------------------

struct Operands {
  Tensor u, x_dbl, dt_weight, dt_bias, A_log, D;
  const char* side = "";

  bool supported(const Tensor& like) const {
    return same_type(u, like) && same_type(x_dbl, like) && is_float(dt_weight) && is_float(dt_bias) &&
           is_float(A_log) && is_float(D) && u.size(2) > 0 && A_log.size(1) > 0;
  }

  void check(const Tensor& like, int64_t dt_rank, int64_t d_state) const {
    const Sizes sizes = sizes_of(like);
    STD_TORCH_CHECK(sizes.size() == 3, "vim: u must be (batch, len, dim)");
    check_extent({sizes[0], sizes[1], sizes[2], d_state});
    check_extent({sizes[0], sizes[1], sizes[2], dt_rank});
    for (const Tensor* x : {&u, &x_dbl, &dt_weight, &dt_bias, &A_log, &D}) check_device("an operand", *x, like);
    check_sizes("u", u, sizes, side);
    check_sizes("x_dbl", x_dbl, {sizes[0], sizes[1], dt_rank + 2 * d_state}, side);
    check_sizes("dt_weight", dt_weight, {sizes[2], dt_rank}, side);
    check_sizes("dt_bias", dt_bias, {sizes[2]}, side);
    check_sizes("A_log", A_log, {sizes[2], d_state}, side);
    check_sizes("D", D, {sizes[2]}, side);
  }

  void make_dense() {
    for (Tensor* weight : {&dt_weight, &dt_bias, &A_log, &D}) *weight = dense(*weight);
  }
};

// dt, B and C side by side in rows of x_dbl or its gradient.
struct Split {
  Activation dt;
  StateMap B, C;

  Split(const Tensor& x_dbl, void* data, int64_t dt_rank, int64_t d_state, int64_t dim) {
    const int64_t item = x_dbl.stride(2);
    char* bytes = static_cast<char*>(data);
    const auto at = [&](int64_t column) -> void* {
      return bytes == nullptr ? nullptr : bytes + column * item * static_cast<int64_t>(x_dbl.element_size());
    };
    dt = {at(0), x_dbl.stride(0), x_dbl.stride(1), item};
    B = {at(dt_rank), x_dbl.stride(0), 0, item, x_dbl.stride(1), dim, nullptr};
    C = {at(dt_rank + d_state), x_dbl.stride(0), 0, item, x_dbl.stride(1), dim, nullptr};
  }
};

struct BidirectionalInputs {
  Operands sides[2];
  Tensor z;

  bool supported() const {
    const Tensor& u = sides[0].u;
    return element_of(u).has_value() && sides[0].supported(u) && sides[1].supported(u) && same_type(z, u);
  }

  void check() const {
    for (const Operands& side : sides) side.check(sides[0].u, sides[0].dt_weight.size(1), sides[0].A_log.size(1));
    check_device("z", z, sides[0].u);
    check_sizes("z", z, sizes_of(sides[0].u));
  }

  Scan scan(double scale) const {
    const Tensor& u = sides[0].u;
    Scan scan;
    scan.element = scan.row_element = *element_of(u);
    scan.batch = u.size(0);
    scan.length = u.size(1);
    scan.dim = u.size(2);
    scan.d_state = sides[0].A_log.size(1);
    scan.dt_rank = sides[0].dt_weight.size(1);
    scan.softplus = scan.A_is_log = true;
    scan.scale = static_cast<float>(scale);
    scan.directions = 2;
    scan.z = input(z, 0, 1, 2);
    for (int d = 0; d < 2; ++d) {
      const Operands& operands = sides[d];
      ScanDirection& side = scan.direction[d];
      const Split split(operands.x_dbl, read_only(operands.x_dbl), scan.dt_rank, scan.d_state, scan.dim);
      side.u = input(operands.u, 0, 1, 2);
      side.dt = split.dt;
      side.B = split.B;
      side.C = split.C;
      side.dt_weight = weight_of(operands.dt_weight);
      side.bias = weight_of(operands.dt_bias);
      side.A = weight_of(operands.A_log);
      side.D = weight_of(operands.D);
      side.reverse = d == 1;
    }
    return scan;
  }
};

// Runs on what fits the device's kernels.
std::tuple<Tensor, Tensor> run_bidirectional(BidirectionalInputs inputs, double scale, int64_t checkpoint_every) {
  inputs.check();
  for (Operands& side : inputs.sides) side.make_dense();
  const Tensor& u = inputs.sides[0].u;
  Scan scan = inputs.scan(scale);
  scan.checkpoint_every = checkpoint_distance(checkpoint_every, scan.length, false);
  const int64_t chunks = chunks_of(scan.length, scan.checkpoint_every);
  const Tensor y = allocate_like(u);
  const Tensor checkpoints = allocate(u, {2, scan.batch, chunks, scan.d_state, scan.dim}, ScalarType::Float);
  scan.y = output(y, 0, 1, 2);
  for (int d = 0; d < 2 && scan.checkpoint_every > 0; ++d) {
    scan.direction[d].checkpoints = mutable_floats(checkpoints) + d * scan.batch * chunks * scan.d_state * scan.dim;
  }
  run_forward(scan, u);
  return {y, checkpoints};
}

std::tuple<Tensor, Tensor> bidirectional_scan(const Tensor& u, const Tensor& x_dbl, const Tensor& dt_weight,
                                              const Tensor& dt_bias, const Tensor& A_log, const Tensor& D,
                                              const Tensor& u_b, const Tensor& x_dbl_b, const Tensor& dt_weight_b,
                                              const Tensor& dt_bias_b, const Tensor& A_b_log, const Tensor& D_b,
                                              const Tensor& z, double scale, int64_t checkpoint_every) {
  const BidirectionalInputs inputs{
      {{u, x_dbl, dt_weight, dt_bias, A_log, D}, {u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_b_log, D_b, kBackwardSide}},
      z};
  if (!inputs.supported()) {
    return call_op<Tensor, Tensor>("vim::bidirectional_scan_reference", u, x_dbl, dt_weight, dt_bias, A_log, D, u_b,
                                   x_dbl_b, dt_weight_b, dt_bias_b, A_b_log, D_b, z, scale, checkpoint_every);
  }
  return run_bidirectional(inputs, scale, checkpoint_every);
}

using BidirectionalGrads =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Writes the gradient of z to `dz` and returns the operands', each direction's of x_dbl in the memory of `dx_dbl` where
// that is given. Where `y` is given, it gets the forward pass's result; it may be dy.
std::vector<Tensor> scan_gradients(const Tensor& dy, BidirectionalInputs inputs, const Tensor& checkpoints,
                                   double scale, int64_t checkpoint_every, const Tensor& dz, const OptionalTensor& y,
                                   const std::array<OptionalTensor, 2>& dx_dbl = {}) {
  inputs.check();
  for (Operands& side : inputs.sides) side.make_dense();
  ScanBackward k;
  k.scan = inputs.scan(scale);
  Scan& scan = k.scan;
  scan.checkpoint_every = checkpoint_distance(checkpoint_every, scan.length, true);
  const int64_t chunks = chunks_of(scan.length, scan.checkpoint_every);
  const Tensor& u = inputs.sides[0].u;
  check_device("dy", dy, u);
  check_device("checkpoints", checkpoints, u);
  check_sizes("dy", dy, sizes_of(u));
  check_sizes("checkpoints", checkpoints, {2, scan.batch, chunks, scan.d_state, scan.dim});
  const Tensor states = dense(checkpoints);
  std::vector<Tensor> outputs;
  for (int d = 0; d < 2; ++d) {
    const Operands& side = inputs.sides[d];
    const OptionalTensor& given = dx_dbl[static_cast<size_t>(d)];
    for (const Tensor* x : {&side.u, &side.x_dbl, &side.dt_weight, &side.dt_bias, &side.A_log, &side.D}) {
      outputs.push_back(x == &side.x_dbl && given.has_value() ? *given : allocate_like(*x));
    }
    const Tensor* of_side = &outputs[static_cast<size_t>(6 * d)];
    const Split split(of_side[1], of_side[1].mutable_data_ptr(), scan.dt_rank, scan.d_state, scan.dim);
    ScanDirectionGrads& grads = k.grads[d];
    grads.du = output(of_side[0], 0, 1, 2);
    grads.ddt = split.dt;
    grads.dB = split.B;
    grads.dC = split.C;
    grads.ddt_weight = gradient_of(of_side[2]);
    grads.dbias = gradient_of(of_side[3]);
    grads.dA = gradient_of(of_side[4]);
    grads.dD = gradient_of(of_side[5]);
    scan.direction[d].checkpoints =
        const_cast<float*>(floats(states)) + d * scan.batch * chunks * scan.d_state * scan.dim;
  }
  k.dy = input(dy, 0, 1, 2);
  k.dz = output(dz, 0, 1, 2);
  if (y.has_value()) k.y = output(*y, 0, 1, 2);
  run_backward(k, u);
  return outputs;
}

BidirectionalGrads bidirectional_scan_backward(const Tensor& dy, const Tensor& u, const Tensor& x_dbl,
                                               const Tensor& dt_weight, const Tensor& dt_bias, const Tensor& A_log,
                                               const Tensor& D, const Tensor& u_b, const Tensor& x_dbl_b,
                                               const Tensor& dt_weight_b, const Tensor& dt_bias_b,
                                               const Tensor& A_b_log, const Tensor& D_b, const Tensor& z,
                                               const Tensor& checkpoints, double scale, int64_t checkpoint_every) {
  const BidirectionalInputs inputs{
      {{u, x_dbl, dt_weight, dt_bias, A_log, D}, {u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_b_log, D_b, kBackwardSide}},
      z};
  if (!inputs.supported() || !same_type(dy, u) || !is_float(checkpoints)) {
    return call_op<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                   Tensor>("vim::bidirectional_scan_backward_reference", dy, u, x_dbl, dt_weight, dt_bias, A_log, D,
                           u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_b_log, D_b, z, checkpoints, scale, checkpoint_every);
  }
  const Tensor dz = allocate_like(z);
  const std::vector<Tensor> o = scan_gradients(dy, inputs, checkpoints, scale, checkpoint_every, dz, std::nullopt);
  return {o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7], o[8], o[9], o[10], o[11], dz};
}

// Attaches the ops of one family of names, those that end in `suffix`.
template <class Library>
void implement_scans(Library& m, const std::string& suffix) {
  m.impl(("selective_scan" + suffix).c_str(), TORCH_BOX(&selective_scan));
  m.impl(("selective_scan_backward" + suffix).c_str(), TORCH_BOX(&selective_scan_backward));
  m.impl(("segmented_scan" + suffix).c_str(), TORCH_BOX(&segmented_scan));
  m.impl(("segmented_scan_backward" + suffix).c_str(), TORCH_BOX(&segmented_scan_backward));
  m.impl(("bidirectional_scan" + suffix).c_str(), TORCH_BOX(&bidirectional_scan));
  m.impl(("bidirectional_scan_backward" + suffix).c_str(), TORCH_BOX(&bidirectional_scan_backward));
}

}  // namespace
}  // namespace vim
