// The scans on a GPU: what bindings call, without a header of CUDA. Workspace is given by the caller, who asks for its
// size first.
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
  int64_t blocks = 0;    // blocks of channels, each of which sums its own dB and dC
  int64_t row = 0;       // what a block sums for a token: dB, dC and, in the fast pass, dt's gradient
  int64_t segments = 1;  // parts of a sequence that run in parallel, each of which sums its own weights' gradients
  int64_t sums = 0;      // sums over states that wait for more, see workspace.h
  int64_t maps = 0;      // (blocks, directions, batch, length, row)
  int64_t weights = 0;   // (directions, batch, segments, rows, dim): see WeightRows
  int64_t adjoints = 0;  // gradients that segments pass on, (directions, batch, segments, 16, dim), and sums of steps
  int64_t steps = 0;     // the general pass: (directions, batch, length, dim), gradients of delta before softplus
};

struct ScanBackwardPasses {
  ScanBackward k;
  ScanBackwardSizes sizes;
  float *sums = nullptr, *maps = nullptr, *weights = nullptr, *adjoints = nullptr, *steps = nullptr;
  // Where there are `steps`, for the products over them, in float32 and both directions in one: dt (directions, batch
  // length, dt_rank) and dt_weight (directions, dim, dt_rank), and what the products give.
  float *dt = nullptr, *dt_weight = nullptr;
  const float *ddt = nullptr, *ddt_weight = nullptr;
};

ScanBackwardSizes scan_backward_sizes(const ScanBackward& k);

// Fills the workspace and writes du, ddelta and dz. Where there are `steps`, the caller then multiplies:
// ddt = steps dt_weight and ddt_weight = steps^T dt.
void scan_backward(const ScanBackwardPasses& passes, void* stream);

// Sums what is left of the gradients, and writes it.
void scan_backward_sums(const ScanBackwardPasses& passes, void* stream);

}  // namespace cuda
}  // namespace vim
