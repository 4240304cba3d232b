// Depthwise convolutions on a GPU; csrc/common/arguments.h has the structs.
#pragma once

#include "../common/arguments.h"

namespace vim {
namespace cuda {

void conv_forward(const Conv& conv, void* stream);

// Floats of workspace that `conv.partials` must have in the backward pass.
int64_t conv_partial_floats(const Conv& conv);

void conv_backward(const Conv& conv, void* stream);

// The same where `seq_idx` is given, in one direction and without workspace.
void segmented_conv_forward(const Conv& conv, void* stream);
void segmented_conv_backward(const Conv& conv, void* stream);

}  // namespace cuda
}  // namespace vim
