// Puts the passes of a scan together.
#include "scan.h"
#include "scan_math.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

namespace {

// The fast kernels begin at 0 and never restart.
bool forward_is_fast(const Scan& scan) { return scan.is_plain() && scan_forward_is_fast(scan); }
bool backward_is_fast(const ScanBackward& k) { return k.scan.is_plain() && scan_backward_is_fast(k); }

}  // namespace

int64_t scan_forward_workspace(const Scan& scan) {
  if (forward_is_fast(scan)) return scan_fast_workspace(scan);
  const bool at_once = scan.directions == 1 && scan.d_state <= 16;
  return at_once ? 0 : scan.batch * scan.length * scan.dim;
}

void scan_forward(const Scan& scan, float* workspace, Stream stream) {
  if (forward_is_fast(scan)) return scan_fast_forward(scan, workspace, stream);
  scan_general_forward(scan, workspace, stream);
}

ScanBackwardSizes scan_backward_sizes(const ScanBackward& k) {
  const Scan& scan = k.scan;
  const int64_t tokens = scan.batch * scan.length;
  ScanBackwardSizes sizes;
  if (backward_is_fast(k)) {
    scan_fast_sizes(k, sizes);
  } else {
    sizes.blocks = ChannelBlocks(scan, kWarp).count;
    sizes.row = 2 * scan.d_state;
    sizes.sums = 3 * tokens * scan.dim;
    if (scan.direction[0].delta.data == nullptr) sizes.steps = scan.directions * tokens * scan.dim;
  }
  sizes.maps = sizes.blocks * scan.directions * tokens * sizes.row;
  sizes.weights = scan.directions * scan.batch * sizes.segments * WeightRows(scan).count * scan.dim;
  return sizes;
}

void scan_backward(const ScanBackwardPasses& passes, Stream stream) {
  backward_is_fast(passes.k) ? scan_fast_backward(passes, stream) : scan_general_backward(passes, stream);
  if (passes.sizes.steps > 0) scan_widen_dt(passes, stream);
}

void scan_backward_sums(const ScanBackwardPasses& passes, Stream stream) {
  scan_sum_weights(passes, stream);
  scan_sum_maps(passes, stream);
}

}  // namespace VIM_ISA
}  // namespace vim
