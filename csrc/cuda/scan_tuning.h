// Tuning of the fast scans by shape. It affects speed only: results and summation order never change.
#pragma once

#include "device.h"

namespace vim {
namespace VIM_ISA {

// A choice for the forward pass.
struct ScanTuning {
  int channels = 0;   // of a thread: 1 or 2
  int warps = 0;      // of a direction in a block: 1, 2 or 4
  int64_t chunk = 0;  // tokens that a block goes through, a multiple of 64; 0 is all of them
};

// The choice for a shape on the current device, unless one was set with vim_cuda_tune_scan.
ScanTuning scan_tuning(const Scan& scan);

// Chunks between saved states that a block of the fast backward pass goes through, of which a segment of the sequence
// is made; all of them unless `blocks` blocks of channels leave half the GPU idle, or vim_cuda_tune_backward chose.
int64_t backward_chunks_of_segment(const Scan& scan, int64_t blocks);

}  // namespace VIM_ISA
}  // namespace vim
