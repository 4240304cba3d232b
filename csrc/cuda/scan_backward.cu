// Decides how a fast backward pass runs, and the kernels between its parts; those of the parts are in
// backward_kernel.h.
#include "backward_kernel.h"
#include "scan_tuning.h"
#include "vector.h"

namespace vim {
namespace VIM_ISA {

namespace {

constexpr int kThreads = 128;

// From the gradients that segments pass on to those with which they are entered, in place: a thread is one state of a
// channel.
__global__ void __launch_bounds__(kThreads) scan_adjoints_kernel(const __grid_constant__ BackwardPlan plan) {
  const Scan& scan = plan.passes.k.scan;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, channel = i % scan.dim;
  const int64_t n = i / scan.dim % kStates, b = i / scan.dim / kStates % scan.batch;
  const int d = static_cast<int>(i / scan.dim / kStates / scan.batch);
  if (d >= scan.directions) return;
  const float A = n < scan.d_state ? kLog2e * decay_rate(scan, scan.direction[d], channel, n) : 0.0f;
  const float* times = plan.passes.adjoints + scan.directions * scan.batch * plan.segments * kStates * scan.dim;
  float carry = 0.0f;
  for (int k = 0; k < plan.segments; ++k) {
    const int64_t segment = (d * scan.batch + b) * plan.segments + k;
    float& entry = plan.passes.adjoints[(segment * kStates + n) * scan.dim + channel];
    const float entered = carry;
    if (k + 1 < plan.segments) carry = fmaf(exp2_approx(A * times[segment * scan.dim + channel]), carry, entry);
    entry = entered;
  }
}

// dz, from y of all directions, and scale y silu(z) where the caller wants it: a block takes a token.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    scan_gate_backward_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const int row = static_cast<int>(blockIdx.x), length = static_cast<int>(scan.length);
  const int b = row / length, token = row % length;
  const auto at = [&](const Activation& x, int64_t channel) {
    return static_cast<T*>(x.data) + b * x.batch + token * x.token + channel * x.channel;
  };
  for (int64_t channel = threadIdx.x * kWidth; channel < scan.dim; channel += kThreads * kWidth) {
    const float* sums = passes.sums + row * scan.dim + channel;
    Floats<kWidth> y = load_floats<kWidth>(sums);
    const Floats<kWidth> other =
        scan.directions == 2 ? load_floats<kWidth>(sums + scan.batch * scan.length * scan.dim) : filled<kWidth>(0);
    const Floats<kWidth> dout = load_floats<kWidth>(at(passes.k.dy, channel)),
                         z = load_floats<kWidth>(at(scan.z, channel));
    Floats<kWidth> dz;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      y[i] += other[i];
      dz[i] = scan.scale * dout[i] * y[i] * silu_slope(z[i]);
      y[i] *= scan.scale * silu(z[i]);
    }
    store_floats(dz, at(passes.k.dz, channel));
    if (passes.k.y.data != nullptr) store_floats(y, at(passes.k.y, channel));
  }
}

Activation as_activation(const StateMap& map) { return {map.data, map.batch, map.token, map.state}; }

// Whether vectors of `count` channels can be loaded from and written to all activations that are there.
bool in_vectors(const ScanBackward& k, int64_t count) {
  const Scan& scan = k.scan;
  const int64_t element = scan.element == Element::float32 ? 4 : 2;
  const auto fits = [&](const Activation& x) { return x.data == nullptr || aligned(x, element, count * element); };
  bool all = ChannelBlocks(scan, 1).segment % count == 0 && fits(scan.z) && fits(k.dy) && fits(k.dz) && fits(k.y);
  for (int d = 0; d < scan.directions; ++d) {
    const ScanDirection& side = scan.direction[d];
    all = all && fits(side.u) && fits(side.delta) && fits(k.grads[d].du) && fits(k.grads[d].ddelta);
  }
  return all;
}

BackwardPlan plan_of(const ScanBackwardPasses& passes) {
  const Scan& scan = passes.k.scan;
  const ChannelBlocks blocks(scan, backward_channels(scan.element));
  BackwardPlan plan;
  plan.passes = passes;
  plan.batch = static_cast<int>(scan.batch);
  plan.group = static_cast<int>(blocks.segment);
  plan.per_group = static_cast<int>(blocks.per_segment);
  plan.blocks = static_cast<int>(blocks.count);
  plan.of_segment = static_cast<int>(backward_chunks_of_segment(scan, blocks.count));
  plan.segments = static_cast<int>(passes.sizes.segments);
  plan.pairs = in_vectors(passes.k, 2);
  plan.whole_maps = scan.d_state == kStates && passes.sizes.row % 4 == 0;
  plan.whole = plan.pairs && plan.whole_maps && scan.z.data != nullptr;
  const int64_t element = scan.element == Element::float32 ? 4 : 2;
  for (int d = 0; d < scan.directions; ++d) {
    const ScanDirection& side = scan.direction[d];
    const auto fits = [&](const Activation& x) { return x.data == nullptr || aligned(x, element, 4 * element); };
    plan.rows[d] = fits(as_activation(side.B)) && fits(as_activation(side.C)) && fits(side.dt) &&
                   side.B.group % 4 == 0 && side.C.group % 4 == 0;
    plan.weights[d] = in_fours(side.dt_weight) && scan.dt_rank % 4 == 0;
    plan.whole = plan.whole && plan.rows[d] && plan.weights[d];
  }
  return plan;
}

}  // namespace

int backward_channels(Element element) {
  int channels = 0;
  with_element(element,
               [&](auto* type) { channels = BackwardShape<std::remove_pointer_t<decltype(type)>, kGiven>::kChannels; });
  return channels;
}

bool scan_backward_is_fast(const ScanBackward& k) {
  const Scan& scan = k.scan;
  bool fast = scan.d_state <= kStates && scan.checkpoint_every <= kChunk &&
              scan.batch * scan.length < (int64_t{1} << 31) && scan.dim < (1 << 30);
  for (int d = 0; d < scan.directions; ++d) {
    const ScanDirection& side = scan.direction[d];
    fast = fast && side.B.constant == nullptr && side.C.constant == nullptr &&
           (side.delta.data != nullptr || scan.dt_rank <= kMostRanks);
  }
  return fast;
}

void scan_fast_sizes(const ScanBackward& k, ScanBackwardSizes& sizes) {
  const Scan& scan = k.scan;
  const int64_t tokens = scan.batch * scan.length;
  sizes.blocks = ChannelBlocks(scan, backward_channels(scan.element)).count;
  sizes.row = 2 * scan.d_state + (scan.direction[0].delta.data == nullptr ? scan.dt_rank : 0);
  const int64_t chunks = blocks_in(scan.length, scan.checkpoint_every);
  sizes.segments = larger(1, blocks_in(chunks, backward_chunks_of_segment(scan, sizes.blocks)));
  sizes.sums = scan.z.data == nullptr ? 0 : scan.directions * tokens * scan.dim;
  const int64_t entered = sizes.segments == 1 ? 0 : scan.directions * scan.batch * sizes.segments;
  sizes.adjoints = entered * (kStates + 1) * scan.dim;
}

void scan_fast_backward(const ScanBackwardPasses& passes, Stream stream) {
  const Scan& scan = passes.k.scan;
  const BackwardPlan plan = plan_of(passes);
  with_element(scan.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (plan.segments > 1) {
      run_backward(plan, stream, true, type);
      const int64_t states = scan.directions * scan.batch * kStates * scan.dim;
      launch(scan_adjoints_kernel, {static_cast<unsigned>(blocks_in(states, kThreads)), kThreads, 0}, stream, plan);
    }
    run_backward(plan, stream, false, type);
    if (scan.z.data == nullptr) return;
    const Geometry geometry{static_cast<unsigned>(scan.batch * scan.length), kThreads, 0};
    in_vectors(passes.k, 4) ? launch(scan_gate_backward_kernel<T, 4>, geometry, stream, passes)
                            : launch(scan_gate_backward_kernel<T, 1>, geometry, stream, passes);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
