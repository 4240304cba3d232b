// The passes that scan.cu puts together.
#pragma once

#include "device.h"
#include "scan.h"

namespace vim {
namespace VIM_ISA {

// `partial` is (batch, length, dim); it is not used where one direction and one group of states do it all.
void scan_general_forward(const Scan& scan, float* partial, Stream stream);

// The fast path for what models do: up to 16 states, B and C per token. Its workspace is in floats.
bool scan_forward_is_fast(const Scan& scan);
int64_t scan_fast_workspace(const Scan& scan);
void scan_fast_forward(const Scan& scan, float* workspace, Stream stream);

// Fills steps, maps and weights, and writes du, ddelta and dz. `sums` is (3, batch, length, dim).
void scan_general_backward(const ScanBackwardPasses& passes, Stream stream);

// The fast path: up to 16 states, B and C per token, saved states at most 64 tokens apart. `sums` is (directions,
// batch, length, dim).
bool scan_backward_is_fast(const ScanBackward& k);
void scan_fast_sizes(const ScanBackward& k, ScanBackwardSizes& sizes);
void scan_fast_backward(const ScanBackwardPasses& passes, Stream stream);

// Brings dt and dt_weight of both directions into the form that matrix products need.
void scan_widen_dt(const ScanBackwardPasses& passes, Stream stream);

void scan_sum_weights(const ScanBackwardPasses& passes, Stream stream);
void scan_sum_maps(const ScanBackwardPasses& passes, Stream stream);

// Rows of a partial of the weights' gradients, each of `dim` numbers. Those of dt_weight are the fast pass's.
struct WeightRows {
  int64_t A, bias, D, B, C, dt, count;

  explicit VIM_INLINE WeightRows(const Scan& scan) {
    A = 0;
    bias = A + scan.d_state;
    D = bias + 1;
    B = D + 1;
    C = B + (scan.direction[0].B.constant != nullptr ? scan.d_state : 0);
    dt = C + (scan.direction[0].C.constant != nullptr ? scan.d_state : 0);
    count = dt + (scan.direction[0].delta.data == nullptr ? scan.dt_rank : 0);
  }
};

// `part` counts batch elements and their segments.
VIM_INLINE float* weight_row(const ScanBackwardPasses& passes, int d, int64_t part, int64_t row) {
  const Scan& scan = passes.k.scan;
  const int64_t parts = scan.batch * passes.sizes.segments;
  return passes.weights + ((d * parts + part) * WeightRows(scan).count + row) * scan.dim;
}

// A block's dB of one token; its dC follows, then in the fast pass what it adds to dt's gradient.
VIM_INLINE float* map_row(const ScanBackwardPasses& passes, int64_t block, int d, int64_t b, int64_t token) {
  const Scan& scan = passes.k.scan;
  const int64_t index = ((block * scan.directions + d) * scan.batch + b) * scan.length + token;
  return passes.maps + index * passes.sizes.row;
}

VIM_INLINE float* step_row(const ScanBackwardPasses& passes, int d, int64_t b, int64_t token) {
  const Scan& scan = passes.k.scan;
  return passes.steps + ((d * scan.batch + b) * scan.length + token) * scan.dim;
}

}  // namespace VIM_ISA
}  // namespace vim
