// The backward pass of scans of any kind; see generic_scan.h. With g the gradient of a state, taken against scan order,
// and e = exp(delta A):
//
//     g[l] = C[l] dy[l] + e[l+1] g[l+1]
//     dB[l] = sum over channels of g[l] delta[l] u[l]       dC[l] = sum over channels of dy[l] h[l]
//     ddelta[l] = sum over states of (g e h[l-1] A + g B u)     dA = sum over tokens of g e h[l-1] delta
//
// States are rebuilt from the saved ones, a few tokens at a time: again from the start of the chunk for each few.
#include "generic_scan.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

namespace {

constexpr int kRebuilt = 8;  // tokens whose states are held at once
constexpr size_t kHeldBytes = (2 * kRebuilt + 1) * kGroup * kWarp * sizeof(float);

// States and decays of a few tokens, in scan order; states start with the one before.
struct Held {
  float *states, *decays;

  VIM_DEVICE Held() {
    states = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
    decays = states + (kRebuilt + 1) * kGroup * kWarp;
  }
  VIM_DEVICE float& state(int64_t i, int n) const { return states[(i * kGroup + n) * kWarp]; }
  VIM_DEVICE float& decay(int64_t i, int n) const { return decays[(i * kGroup + n) * kWarp]; }
};

// What a group of sixteen states sums over tokens.
struct GroupSums {
  float g[kGroup], dA[kGroup], dB[kGroup], dC[kGroup];
};

template <class T>
struct GeneralBackward {
  const ScanBackwardPasses& passes;
  const Scan& scan;
  const GeneralThread& thread;
  const int d;
  const ScanDirection& side;
  float dbias = 0, dD = 0;

  VIM_DEVICE GeneralBackward(const ScanBackwardPasses& passes_, const GeneralThread& thread_, int d_)
      : passes(passes_), scan(passes_.k.scan), thread(thread_), d(d_), side(passes_.k.scan.direction[d_]) {}

  VIM_DEVICE float* sum(int which, int64_t token) const {
    return passes.sums + ((which * scan.batch + thread.b) * scan.length + token) * scan.dim + thread.channel;
  }

  // Places [from, to) of a chunk that the scan enters at `start`.
  VIM_DEVICE void rebuild(GeneralStates<T>& states, const Held& held, int64_t start, int64_t from, int64_t to) const {
    for (int64_t place = start; place < to; ++place) {
      const int64_t token = token_at(side, scan.length, place);
      const float delta = states.step(token), u = read<T>(side.u, thread.b, token, thread.channel);
      if (place >= from) {
#pragma unroll
        for (int n = 0; n < kGroup; ++n) {
          held.decay(place - from, n) = exp2_approx(delta * (states.A[n] * kLog2e));
          held.state(place - from, n) = states.h[n];
        }
      }
      states.advance(token, delta, u);
    }
#pragma unroll
    for (int n = 0; n < kGroup; ++n) held.state(to - from, n) = states.h[n];
  }

  // dB and dC of one state and token: over the warp's channels, or kept by the channel where the map is constant.
  VIM_DEVICE void add_maps(const GeneralStates<T>& states, GroupSums& sums, int64_t token, int n, float dB,
                           float dC) const {
    float* row = map_row(passes, thread.block, d, thread.b, token) + states.n0 + n;
    if (side.B.constant != nullptr) {
      sums.dB[n] += dB;
    } else {
      const float total = sum_warp(thread.active ? dB : 0.0f);
      if (threadIdx.x == 0 && states.n0 + n < scan.d_state) row[0] = total;
    }
    if (side.C.constant != nullptr) {
      sums.dC[n] += dC;
    } else {
      const float total = sum_warp(thread.active ? dC : 0.0f);
      if (threadIdx.x == 0 && states.n0 + n < scan.d_state) row[scan.d_state] = total;
    }
  }

  VIM_DEVICE void sweep(const GeneralStates<T>& states, GroupSums& sums, const Held& held, int64_t i, int64_t token) {
    const int64_t b = thread.b, channel = thread.channel;
    float slope;
    const float u = read<T>(side.u, b, token, channel), delta = states.step(token, &slope);
    const bool gated = scan.z.data != nullptr;
    const float z = gated ? read<T>(scan.z, b, token, channel) : 0.0f;
    const float dout = scan.scale * read<T>(passes.k.dy, b, token, channel), dy = gated ? dout * silu(z) : dout;
    const bool restarts = restarts_at(scan, side, b, token);
    const bool first_group = states.n0 == 0, last_group = states.n0 + kGroup >= scan.d_state;
    float through_decay = first_group ? 0.0f : *sum(0, token), through_drive = first_group ? 0.0f : *sum(1, token);
    float y = first_group && d == 0 ? 0.0f : *sum(2, token);
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      const float after = held.state(i + 1, n), c = states.C(token, n), dh = fmaf(dy, c, sums.g[n]);
      add_maps(states, sums, token, n, dh * delta * u, dy * after);
      y = fmaf(after, c, y);
      through_drive = fmaf(dh, states.B(token, n), through_drive);
      sums.g[n] = restarts ? 0.0f : dh * held.decay(i, n);
      const float dlog = restarts ? 0.0f : sums.g[n] * held.state(i, n);
      through_decay = fmaf(dlog, states.A[n], through_decay);
      sums.dA[n] = fmaf(dlog, delta, sums.dA[n]);
    }
    const float D = read_or_zero(side.D, channel);
    if (first_group) y = fmaf(D, u, y);
    if (!thread.active) return;
    *sum(0, token) = through_decay;
    *sum(1, token) = through_drive;
    *sum(2, token) = y;
    if (!last_group) return;
    const float ddelta = fmaf(through_drive, u, through_decay) * slope;
    dbias += ddelta;
    dD = fmaf(dy, u, dD);
    const ScanDirectionGrads& grads = passes.k.grads[d];
    write<T>(grads.du, b, token, channel, fmaf(through_drive, delta, D * dy));
    if (side.delta.data != nullptr) {
      write<T>(grads.ddelta, b, token, channel, ddelta);
    } else {
      step_row(passes, d, b, token)[channel] = ddelta;
    }
    if (!gated || d + 1 < scan.directions) return;
    write<T>(passes.k.dz, b, token, channel, dout * y * silu_slope(z));
    if (passes.k.y.data != nullptr) write<T>(passes.k.y, b, token, channel, scan.scale * y * silu(z));
  }

  VIM_DEVICE void run_group(int64_t n0) {
    const Held held;
    GroupSums sums{};
    GeneralStates<T> states(scan, side, thread.b, thread.channel, n0);
    const float* dlast = passes.k.grads[d].dlast_state;
#pragma unroll
    for (int n = 0; n < kGroup && n0 + n < scan.d_state && dlast != nullptr; ++n) {
      sums.g[n] = dlast[(thread.b * scan.dim + thread.channel) * scan.d_state + n0 + n];
    }
    const int64_t every = scan.checkpoint_every, saved = blocks_in(scan.length, every);
    for (int64_t i = 0; i < saved; ++i) {
      const int64_t chunk = side.reverse ? i : saved - 1 - i;
      const int64_t begin = chunk * every, end = smaller(begin + every, scan.length);
      const int64_t start = side.reverse ? scan.length - end : begin, stop = start + (end - begin);
      const float* entry = side.checkpoints + (thread.b * saved + chunk) * scan.d_state * scan.dim;
      for (int64_t from = start + (stop - start - 1) / kRebuilt * kRebuilt; from >= start; from -= kRebuilt) {
        const int64_t to = smaller(from + kRebuilt, stop);
        states.load(entry);
        rebuild(states, held, start, from, to);
        for (int64_t place = to - 1; place >= from; --place) {
          sweep(states, sums, held, place - from, token_at(side, scan.length, place));
        }
      }
    }
    write_sums(sums, n0);
  }

  VIM_DEVICE void write_sums(const GroupSums& sums, int64_t n0) const {
    if (!thread.active) return;
    const WeightRows rows(scan);
    float* dinitial = passes.k.grads[d].dinitial_state;
#pragma unroll
    for (int n = 0; n < kGroup && n0 + n < scan.d_state; ++n) {
      if (dinitial != nullptr) dinitial[(thread.b * scan.dim + thread.channel) * scan.d_state + n0 + n] = sums.g[n];
      weight_row(passes, d, thread.b, rows.A + n0 + n)[thread.channel] = sums.dA[n];
      if (side.B.constant != nullptr) weight_row(passes, d, thread.b, rows.B + n0 + n)[thread.channel] = sums.dB[n];
      if (side.C.constant != nullptr) weight_row(passes, d, thread.b, rows.C + n0 + n)[thread.channel] = sums.dC[n];
    }
    if (n0 + kGroup >= scan.d_state) {
      weight_row(passes, d, thread.b, rows.bias)[thread.channel] = dbias;
      weight_row(passes, d, thread.b, rows.D)[thread.channel] = dD;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kWarp)
    scan_general_backward_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const GeneralThread thread(passes.k.scan);
  for (int d = 0; d < passes.k.scan.directions; ++d) {
    GeneralBackward<T> backward(passes, thread, d);
    for (int64_t n0 = 0; n0 < passes.k.scan.d_state; n0 += kGroup) backward.run_group(n0);
  }
}

}  // namespace

void scan_general_backward(const ScanBackwardPasses& passes, Stream stream) {
  const Scan& scan = passes.k.scan;
  const Geometry geometry{static_cast<unsigned>(scan.batch * ChannelBlocks(scan, kWarp).count), kWarp, kHeldBytes};
  with_element(scan.element, [&](auto* type) {
    launch(scan_general_backward_kernel<std::remove_pointer_t<decltype(type)>>, geometry, stream, passes);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
