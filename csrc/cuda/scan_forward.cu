// Decides how a fast forward pass runs; its kernels are in forward_kernel.h.
#include "forward_kernel.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

namespace {

// From the states that chunks end in to those in which they are entered, in place: a thread is one state of a channel.
__global__ void __launch_bounds__(kMaxThreads) scan_entries_kernel(const __grid_constant__ ForwardPlan plan) {
  const Scan& scan = plan.scan;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, channel = i % scan.dim;
  const int64_t n = i / scan.dim % kStates, b = i / scan.dim / kStates % scan.batch;
  const int d = static_cast<int>(i / scan.dim / kStates / scan.batch);
  if (d >= scan.directions) return;
  const ScanDirection& side = scan.direction[d];
  const float A = n < scan.d_state ? decay_rate(scan, side, channel, n) : 0.0f;
  float carry = 0.0f;
  for (int k = 0; k < plan.chunks; ++k) {
    const int64_t chunk = (d * scan.batch + b) * plan.chunks + (side.reverse ? plan.chunks - 1 - k : k);
    float& entry = plan.entries[(chunk * kStates + n) * scan.dim + channel];
    const float end = entry;
    entry = carry;
    carry = fmaf(exp2_approx(A * plan.times[chunk * scan.dim + channel]), carry, end);
  }
}

Activation as_activation(const StateMap& map) { return {map.data, map.batch, map.token, map.state}; }

int64_t segment_of(const Scan& scan) { return ChannelBlocks(scan, 1).segment; }

Vectors vectors_of(const Scan& scan, const ScanDirection& side) {
  const int64_t element = scan.element == Element::float32 ? 4 : 2;
  const bool whole = segment_of(scan) % (16 / element) == 0;
  Vectors v{};
  v.u = whole && aligned(side.u, element, 16);
  v.delta = whole && side.delta.data != nullptr && aligned(side.delta, element, 16);
  v.rows = scan.d_state == kStates && aligned(as_activation(side.B), element, 4 * element) &&
           aligned(as_activation(side.C), element, 4 * element) && side.B.group * element % (4 * element) == 0 &&
           side.C.group * element % (4 * element) == 0;
  v.rows = v.rows && side.B.token == side.C.token;
  v.weights = scan.d_state == kStates && in_fours(side.A) && scan.dt_rank % 4 == 0 && in_fours(side.dt_weight);
  if (side.delta.data == nullptr)
    v.rows = v.rows && side.dt.token == side.B.token && scan.dt_rank % 4 == 0 && aligned(side.dt, element, 4 * element);
  return v;
}

bool partial_in_y(const Scan& scan) { return scan.element == Element::float32 && scan.y.channel == 1; }

}  // namespace

bool scan_forward_is_fast(const Scan& scan) {
  const bool projected = scan.direction[0].delta.data == nullptr;
  bool fast = scan.length > 0 && scan.scale != 0 && scan.d_state <= kStates && scan.checkpoint_every % kUnit == 0 &&
              scan.length < (1 << 30) && scan.dim < (1 << 30) && projected == (scan.directions == 2) &&
              (!projected || scan.softplus) && scan.dt_rank <= kMostRanks;
  for (int d = 0; d < scan.directions; ++d) {
    fast = fast && scan.direction[d].B.constant == nullptr && scan.direction[d].C.constant == nullptr;
  }
  return fast;
}

int64_t scan_fast_workspace(const Scan& scan) {
  const ScanTuning tuning = scan_tuning(scan);
  const int64_t chunks = tuning.chunk == 0 ? 1 : blocks_in(scan.length, tuning.chunk);
  const int64_t states = chunks == 1 ? 0 : scan.directions * scan.batch * chunks * (kStates + 1) * scan.dim;
  const int64_t partial = scan.directions == 1 || partial_in_y(scan) ? 0 : scan.batch * scan.length * scan.dim;
  return partial + states;
}

void scan_fast_forward(const Scan& scan, float* workspace, Stream stream) {
  const ScanTuning tuning = scan_tuning(scan);
  ForwardPlan plan;
  plan.scan = scan;
  plan.inverse_scale = kLog2e / scan.scale;
  plan.chunk = static_cast<int>(tuning.chunk == 0 ? round_up(scan.length, kUnit) : tuning.chunk);
  plan.chunks = static_cast<int>(blocks_in(scan.length, plan.chunk));
  if (plan.chunks > 1) {
    plan.entries = workspace;
    plan.times = workspace + scan.directions * scan.batch * plan.chunks * kStates * scan.dim;
    workspace = plan.times + scan.directions * scan.batch * plan.chunks * scan.dim;
  }
  plan.partial = partial_in_y(scan) ? scan.y : Activation{workspace, scan.length * scan.dim, scan.dim, 1};
  plan.vector_partial = segment_of(scan) % 4 == 0 && aligned(plan.partial, 4, 16);
  const int64_t element = scan.element == Element::float32 ? 4 : 2;
  plan.vector_z = segment_of(scan) % (16 / element) == 0 && aligned(scan.z, element, 16);
  for (int d = 0; d < scan.directions; ++d) plan.vectors[d] = vectors_of(scan, scan.direction[d]);
  with_element(scan.element, [&](auto* type) {
    if (plan.chunks > 1) {
      run_ends(plan, stream, type);
      const int64_t states = scan.directions * scan.batch * kStates * scan.dim;
      launch(scan_entries_kernel, {static_cast<unsigned>(blocks_in(states, kMaxThreads)), kMaxThreads, 0}, stream,
             plan);
    }
    run_walks(plan, tuning, stream, type);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
