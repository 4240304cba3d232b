// The scans on a GPU: what bindings call. Workspace is given by the caller, who asks for its size first;
// csrc/common/arguments.h has the structs. Bindings include this file, so it includes nothing of the kernels'.
#pragma once

#include "../common/arguments.h"

namespace vim {
namespace cuda {

// ---- forward ---------------------------------------------------------------------------------------------------

// Floats of workspace
int64_t scan_forward_workspace(const Scan& scan);
void scan_forward(const Scan& scan, float* workspace, void* stream);

// ---- backward --------------------------------------------------------------------------------------------------

// Sizes of the buffers between the passes of the backward, in floats; the fields below point at the buffers.
struct ScanBackwardSizes {
  int64_t blocks = 0;   // blocks of channels, each of which sums its own dB and dC
  int64_t steps = 0;    // (directions, batch, length, dim): gradients of delta before softplus
  int64_t sums = 0;     // sums over states that wait for more, see workspace.h
  int64_t maps = 0;     // (blocks, directions, batch, length, 2 d_state): dB and dC
  int64_t weights = 0;  // (directions, batch, rows, dim): dA, dB and dC where constant, dbias, dD
};

struct ScanBackwardPasses {
  ScanBackward k;
  ScanBackwardSizes sizes;
  float *steps = nullptr, *sums = nullptr, *maps = nullptr, *weights = nullptr;
  // Where delta is projected, for the products over `steps`, in float32 and both directions in one: dt (directions,
  // batch length, dt_rank) and dt_weight (directions, dim, dt_rank), and what the products give.
  float *dt = nullptr, *dt_weight = nullptr;
  const float *ddt = nullptr, *ddt_weight = nullptr;
};

ScanBackwardSizes scan_backward_sizes(const ScanBackward& k);

// Fills the workspace and writes du, ddelta and dz. Where delta is projected, the caller then multiplies:
// ddt = steps dt_weight and ddt_weight = steps^T dt.
void scan_backward(const ScanBackwardPasses& passes, void* stream);

// Sums what is left of the gradients, and writes it.
void scan_backward_sums(const ScanBackwardPasses& passes, void* stream);

}  // namespace cuda
}  // namespace vim
