// Kernels of several passes, as the bindings start them.
#pragma once

#include "parallel.h"

namespace vim {

// The scan with dt, B and C in float32, where they are side by side in half precision: every block of channels would
// convert them anew. They are then in `rows`.
Scan with_float_rows(const Scan& scan, const Tensor& like, OptionalTensor& rows);

// `like` is where workspace is allocated.
void run_scan_backward(const ScanBackwardTasks& k);
void run_conv_backward(Conv& conv, const Tensor& like);
void run_norm_backward(Norm& norm, const Tensor& like);

}  // namespace vim
