// The forward pass of scans of any kind; see generic_scan.h.
#include "generic_scan.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

namespace {

// `partial` (batch, length, dim) keeps what the groups of states and the directions before have given.
template <class T>
__global__ void __launch_bounds__(kWarp)
    scan_general_forward_kernel(const __grid_constant__ Scan scan, float* partial) {
  const GeneralThread thread(scan);
  if (!thread.active) return;
  const int64_t b = thread.b, channel = thread.channel;
  const int64_t saved = scan.checkpoint_every == 0 ? 0 : blocks_in(scan.length, scan.checkpoint_every);
  for (int d = 0; d < scan.directions; ++d) {
    const ScanDirection& side = scan.direction[d];
    const float D = read_or_zero(side.D, channel);
    for (int64_t n0 = 0; n0 < scan.d_state; n0 += kGroup) {
      GeneralStates<T> states(scan, side, b, channel, n0);
      states.begin();
      const bool first = d == 0 && n0 == 0;
      const bool last = d + 1 == scan.directions && n0 + kGroup >= scan.d_state;
      for (int64_t place = 0; place < scan.length; ++place) {
        const int64_t token = token_at(side, scan.length, place);
        const int64_t edge = side.reverse ? token + 1 : token;  // tokens before the border that the scan passes here
        if (saved > 0 && (edge % scan.checkpoint_every == 0 || place == 0)) {
          states.save(side.checkpoints + (b * saved + token / scan.checkpoint_every) * scan.d_state * scan.dim);
        }
        const float delta = states.step(token), u = read<T>(side.u, b, token, channel);
        states.advance(token, delta, u);
        float* sum = partial + (b * scan.length + token) * scan.dim + channel;
        float y = (first ? 0.0f : *sum) + states.read_out(token);
        if (n0 == 0) y = fmaf(D, u, y);
        if (!last) {
          *sum = y;
        } else {
          y *= scan.scale;
          if (scan.z.data != nullptr) y *= silu(read<T>(scan.z, b, token, channel));
          write<T>(scan.y, b, token, channel, y);
        }
      }
      if (side.last_state != nullptr) {
        for (int n = 0; n < kGroup && n0 + n < scan.d_state; ++n) {
          side.last_state[(b * scan.dim + channel) * scan.d_state + n0 + n] = states.h[n];
        }
      }
    }
  }
}

}  // namespace

void scan_general_forward(const Scan& scan, float* partial, Stream stream) {
  const Geometry geometry{static_cast<unsigned>(scan.batch * ChannelBlocks(scan, kWarp).count), kWarp, 0};
  with_element(scan.element, [&](auto* type) {
    launch(scan_general_forward_kernel<std::remove_pointer_t<decltype(type)>>, geometry, stream, scan, partial);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
