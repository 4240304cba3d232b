// Residual addition and RMSNorm on a GPU; csrc/common/arguments.h has the structs.
#pragma once

#include "../common/arguments.h"

namespace vim {
namespace cuda {

void norm_forward(const Norm& norm, void* stream);

// Floats of workspace that `norm.partials` must have in the backward pass.
int64_t norm_partial_floats(const Norm& norm);

void norm_backward(const Norm& norm, void* stream);

}  // namespace cuda
}  // namespace vim
