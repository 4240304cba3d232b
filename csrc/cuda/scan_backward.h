// How a fast backward pass is cut, and the kernels for each element type.
#pragma once

#include "device.h"
#include "scan.h"

namespace vim {
namespace VIM_ISA {

struct BackwardPlan {
  ScanBackwardPasses passes;
  int batch = 0;
  // Blocks of channels, and those of a group, which no block goes beyond: see ChannelBlocks.
  int group = 0, per_group = 1, blocks = 0;
  int segments = 1, of_segment = 0;  // of a sequence; chunks of a segment
  // What can be loaded or written at once: two channels of any activation, four numbers of a token's dt, B and C, of
  // dt_proj's weight, and of a block's sums.
  bool pairs = false, rows[2] = {}, weights[2] = {}, whole_maps = false;
  bool whole = false;  // all of it, in every direction
};

// Channels of a block
int backward_channels(Element element);

// Runs the sweeps, or with `adjoint` only finds the gradients that segments pass on.
void run_backward(const BackwardPlan& plan, Stream stream, bool adjoint, float*);
void run_backward(const BackwardPlan& plan, Stream stream, bool adjoint, bfloat16*);
void run_backward(const BackwardPlan& plan, Stream stream, bool adjoint, float16*);

}  // namespace VIM_ISA
}  // namespace vim
