// The scans for a GPU.
#include "../common/bind_scan.h"

#include "binding.h"
#include "ops.h"
#include "scan.h"

namespace vim {
namespace {

void run_forward(const Scan& scan, const Tensor& like) {
  const OnDeviceOf device(like);
  const Tensor workspace = allocate(like, {cuda::scan_forward_workspace(scan)}, ScalarType::Float);
  cuda::scan_forward(scan, mutable_floats(workspace), device.stream());
}

// a b of each direction, in float32. Autocast, which may be on while gradients are computed, would make `matmul` return
// half precision; overloads with `out` it leaves alone.
Tensor products(const Tensor& a, const Tensor& b) {
  const Tensor out = allocate(a, {a.size(0), a.size(1), b.size(2)});
  call_overload<Tensor>("aten::bmm", "out", a, b, out);
  return out;
}

void run_backward(const ScanBackward& backward, const Tensor& like) {
  const OnDeviceOf device(like);
  const Scan& scan = backward.scan;
  cuda::ScanBackwardPasses passes;
  passes.k = backward;
  passes.sizes = cuda::scan_backward_sizes(backward);
  const auto floats_of = [&](const Sizes& sizes) { return allocate(like, sizes, ScalarType::Float); };
  const Tensor sums = floats_of({passes.sizes.sums}), maps = floats_of({passes.sizes.maps});
  const Tensor weights = floats_of({passes.sizes.weights}), adjoints = floats_of({passes.sizes.adjoints});
  passes.sums = mutable_floats(sums);
  passes.maps = mutable_floats(maps);
  passes.weights = mutable_floats(weights);
  passes.adjoints = mutable_floats(adjoints);
  if (passes.sizes.steps == 0) {
    cuda::scan_backward(passes, device.stream());
    cuda::scan_backward_sums(passes, device.stream());
    return;
  }
  const int64_t tokens = scan.batch * scan.length;
  const Tensor steps = floats_of({scan.directions, tokens, scan.dim});
  const Tensor dt = floats_of({scan.directions, tokens, scan.dt_rank});
  const Tensor dt_weight = floats_of({scan.directions, scan.dim, scan.dt_rank});
  passes.steps = mutable_floats(steps);
  passes.dt = mutable_floats(dt);
  passes.dt_weight = mutable_floats(dt_weight);
  cuda::scan_backward(passes, device.stream());
  const Tensor ddt = products(steps, dt_weight);
  const Tensor ddt_weight = products(torch::stable::transpose(steps, 1, 2), dt);
  passes.ddt = floats(ddt);
  passes.ddt_weight = floats(ddt_weight);
  cuda::scan_backward_sums(passes, device.stream());
}

BidirectionalInputs inputs_of(const on_cuda::ScanSide& f, const on_cuda::ScanSide& b, const Tensor& z) {
  return {{{f.u, f.x_dbl, f.dt_weight, f.dt_bias, f.A_log, f.D},
           {b.u, b.x_dbl, b.dt_weight, b.dt_bias, b.A_log, b.D, kBackwardSide}},
          z};
}

}  // namespace

std::tuple<Tensor, Tensor> on_cuda::bidirectional_scan(const ScanSide& f, const ScanSide& b, const Tensor& z,
                                                       double scale, int64_t checkpoint_every) {
  return run_bidirectional(inputs_of(f, b, z), scale, checkpoint_every);
}

std::vector<Tensor> on_cuda::scan_gradients(const Tensor& dy, const ScanSide& f, const ScanSide& b, const Tensor& z,
                                            const Tensor& checkpoints, double scale, int64_t checkpoint_every,
                                            const Tensor& dz, const std::array<OptionalTensor, 2>& dx_dbl) {
  return vim::scan_gradients(dy, inputs_of(f, b, z), checkpoints, scale, checkpoint_every, dz, dy, dx_dbl);
}

}  // namespace vim

VIM_DEVICE_IMPL(m) { vim::implement_scans(m, vim::kFamily); }
